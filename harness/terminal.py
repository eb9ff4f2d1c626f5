"""What the user sees of a command: its errors, signals and exit status, its progress bar, its command line."""

import argparse
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from harness.processes import RANK, WORLD_SIZE


class UserError(Exception):
    """A mistake that the user can mend; its text is one line that says what is wrong and what to do."""


def run(main):
    """Calls `main()`, as a script's last line does, and ends the process with one line on stderr where need be.

    A UserError has exit status 2, Ctrl-C 130, and SIGTERM, by which a cluster ends a job, 143.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a class name that the locale cannot print ends no run
    handle_signals()
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Interrupted as error:
        end(128 + error.number, str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        end(2, "error: whoever read the output has gone")
    except (UserError, OSError) as error:  # an OSError that got here: a file or folder without permission, say
        end(2, f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if WORLD_SIZE > 1 and re.search("gloo|NCCL|onnection", str(error)):
            end(1, "error: the connection to another process is lost; its own error says why")
        causes = [error, error.__context__]  # out of memory during a capture is the cause of the error at its end
        texts = ["out of memory" if isinstance(cause, MemoryError) else str(cause) for cause in causes]
        if not re.search("out of memory|can't allocate memory", " ".join(texts)):
            raise
        where = "the GPU" if "CUDA" in str(causes) else "this machine"
        end(2, f"error: out of memory on {where}; take a smaller --batch-size")


def printable(text):
    """The text with escapes in the place of what cannot be shown: a file's name may hold a newline."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def end(status, line):
    if RANK > 0:  # most errors are everybody's, and the first process says them; then torchrun ends this one here
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(f"{Path(sys.argv[0]).name}: {printable(line)}", file=sys.stderr, flush=True)
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        os._exit(status)  # a group that has lost a member may never come to its orderly end
    sys.exit(status)


class Interrupted(BaseException):
    """What a signal raises, with its `number`; no Exception, which would be taken for the fault of a file."""

    def __init__(self, number, advice):
        super().__init__(f"ended by {signal.Signals(number).name}{advice}")
        self.number = number


def handle_signals(advice=""):
    """Makes SIGINT and SIGTERM raise Interrupted; `advice` says how to go on, behind a semicolon."""

    def interrupt(number, frame):
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # the second Ctrl-C of an impatient user must not disturb the first
        raise Interrupted(number, advice)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def progress_bar(*args, **kwargs):
    """tqdm's, on stdout, where that is a terminal."""
    return tqdm(*args, **kwargs, file=sys.stdout, disable=not sys.stdout.isatty())


class CommandLine(argparse.ArgumentParser):
    """argparse's parser; a mistake gets one line and exit status 2."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        end(2, f"error: {message} (see --help)")
