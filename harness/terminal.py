"""A command as its user sees it: its one line of error, its exit status, its progress bar, its command line."""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from harness.processes import RANK, WORLD_SIZE, leave_processes

IN_USE = " is in use by "  # in the error if another run holds the folder, after which a run on a cluster tries again


class UserError(Exception):
    """An error the user can fix. Its one-line message says what is wrong and what to do."""


class Interrupted(BaseException):
    """Raised by a signal, with its `number`. It is not an Exception, so that `except Exception` does not swallow it."""

    def __init__(self, number: int, advice: str):
        super().__init__(f"ended by {signal.Signals(number).name}{advice}")
        self.number = number


def run(main: Callable[[], None]) -> None:
    """Call `main()` and turn an error into one line on stderr and an exit status. Scripts end with this call.

    The status is 2 after an error the user can fix, 130 after Ctrl-C, and 143 after SIGTERM, with which a cluster ends
    a job. It is 1 after a process lost its connection to another one under torchrun.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # not in IDLE or a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # the locale may be unable to print a class name
    handle_signals()
    if WORLD_SIZE > 1:  # while a process waits for rank 0 to begin the run, Python would not handle it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        main()
        leave_processes()
        sys.stdout.flush()  # here, since at exit Python would report a failure in its own way
    except Interrupted as error:
        exit_with(128 + error.number, str(error))
    except BrokenPipeError:
        exit_with(2, "error: the program that read the output has ended")
    except UserError as error:
        exit_with(2, f"error: {error}")
    except OSError as error:  # such as a file or folder without permission
        where = f"{error.filename}: {error.strerror}; use another path, or fix this one"
        exit_with(2, f"error: {where if error.filename else error}")
    except (RuntimeError, MemoryError) as error:
        if WORLD_SIZE > 1 and re.search("gloo|NCCL|onnection", str(error)):
            exit_with(1, f"error: the connection to another process is lost; its own error says why ({error})")
        advice = advice_on(error)
        if not advice:
            raise
        exit_with(2, f"error: {advice}")


def advice_on(error: Exception) -> str | None:
    """Return what the user can do about an error of PyTorch or Python, or None if it is a bug."""
    if "no kernel image" in str(error):
        return "this build of PyTorch does not support this GPU; use --device cpu, or another build"
    causes = [error, error.__context__]  # running out of memory in a capture causes its final error
    texts = ["out of memory" if isinstance(cause, MemoryError) else str(cause) for cause in causes]
    if not re.search("out of memory|can't allocate memory|STATUS_ALLOC_FAILED", " ".join(texts)):
        return None
    on_gpu = re.search("CUDA|CUBLAS|CUDNN", str(causes))
    where, otherwise = ("the GPU", "use --device cpu") if on_gpu else ("this machine", "free some memory")
    return f"out of memory on {where}; {otherwise}, or train with a smaller --batch-size"


def handle_signals(advice: str = "") -> None:
    """Make SIGINT and SIGTERM raise Interrupted, whose message ends with `advice` on how to resume."""

    def interrupt(number, frame):
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # the second Ctrl-C of an impatient user must not disturb the first
        raise Interrupted(number, advice)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def exit_with(status: int, line: str) -> NoReturn:
    """Print the script's name and the line on stderr, and end this process."""
    if RANK > 0:  # rank 0 prints most errors for all ranks, then torchrun ends the others during this sleep
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print_error(line)
    try:
        sys.stdout.flush()
    except OSError:  # the disk is full or the reader has ended, which Python would report again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if WORLD_SIZE > 1:
        os._exit(status)  # a group that has lost a member may never shut down
    sys.exit(status)


def print_error(line: str) -> None:
    """Print the script's name and the line on stderr."""
    print(f"{Path(sys.argv[0]).name}: {escape_unprintable(line)}", file=sys.stderr, flush=True)


def escape_unprintable(text: str) -> str:
    """Return the text on one line, with unprintable characters escaped, such as a newline in a file's name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def progress_bar(*args, **kwargs) -> tqdm:
    """Return tqdm's progress bar on stdout, disabled unless stdout is a terminal."""
    return tqdm(*args, **kwargs, file=sys.stdout, disable=not sys.stdout.isatty())


def nonempty_path(text: str) -> Path:
    """Return a flag's path. Refuse an empty one, which usually comes from a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def data_folder(text: str) -> str:
    """Return the value of --data, a folder or "synthetic"."""
    nonempty_path(text)
    return text


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """An argparse formatter that leaves a help text with a percent sign as it is."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help


class CommandLine(argparse.ArgumentParser):
    """An argparse parser that answers a user error with one line and exit status 2."""

    def __init__(self, description: str):
        # prog: argparse's own begins with "python -m" after python -m, from Python 3.14 on
        name = Path(sys.argv[0]).name
        super().__init__(prog=name, description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def add_data(self, help: str = "as for the training scripts (default: data)") -> None:
        """Add --data, a folder or "synthetic"."""
        self.add_argument("--data", type=data_folder, default="data", metavar="DIR", help=help)

    def add_device(self, help: str = "as for the training scripts (default: auto)") -> None:
        """Add --device, for `choose_device`."""
        self.add_argument("--device", default="auto", help=help)

    def error(self, message: str) -> NoReturn:
        exit_with(2, f"error: {message} (see --help)")
