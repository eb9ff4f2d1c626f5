"""The flags that every training script has. Parsing only: nothing here touches a device, a file or a process."""

import argparse
import importlib.util
import math
import shlex
import sys
from itertools import chain
from pathlib import Path

from harness.devices import DTYPES
from harness.processes import WORLD_SIZE
from harness.terminal import CommandLine


class ArgumentParser(CommandLine):
    """The flags that every training script has, with the script's own recipe as their defaults.

    A script adds the flags of its experiment with `add_argument`.
    """

    def __init__(
        self, description: str, *, epochs: int | dict[str, int], batch_size: int, lr: float, precision: str = "auto"
    ):
        """Take the recipe's numbers. epochs: a dict holds a number for each experiment; the script picks its own."""
        super().__init__(description)
        add = self.add_argument
        add("--data", default="data", metavar="DIR", help="CIFAR-10 or class folders, or 'synthetic' (default: data)")
        counts = epochs
        if isinstance(epochs, dict):
            counts, epochs = ", ".join(f"{name} {count}" for name, count in epochs.items()), None
        add("--epochs", type=positive_int, default=epochs, metavar="N", help=f"(default: {counts})")
        add("--batch-size", type=positive_int, default=batch_size, metavar="N", help="(default: %(default)s)")
        add("--lr", type=positive_float, metavar="X", help=f"learning rate (default: {lr}, or a resumed run's own)")
        add("--seed", type=seed_int, default=0, metavar="N", help="(default: %(default)s)")
        add("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto (default: auto: CUDA, then MPS, then CPU)")
        add("--precision", choices=["auto", *DTYPES], default=precision, help="(default: %(default)s)")
        add("--checkpoints", type=Path, default="checkpoints", metavar="DIR", help="(default: checkpoints)")
        add("--tensorboard", action="store_true", help="write the log for TensorBoard too, into the run's folder")
        mode = self.add_mutually_exclusive_group()
        add = mode.add_argument
        add("--resume", nargs="?", const=True, metavar="FILE", help="go on from this run's last.pt, or from FILE")
        add("--evaluate", nargs="?", const=True, metavar="FILE", help="only test this run's last.pt, or FILE")
        self.recipe_lr = lr
        self.common = {action.dest for action in self._actions}

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Return the flags, and with them how this command line is told.

        script: the script's name; experiment: the values of its own flags where they are given, a bare flag's name
        otherwise; command: the line without its paths; resume_command: the line that resumes the run; lr_given: bool.
        """
        args = super().parse_args(argv)
        given = {}  # the flags that are not at their default, as words of a command line
        for action in self._actions:
            flag, value = action.option_strings[0], getattr(args, action.dest, None)
            if value not in (None, action.default):
                given[action.dest] = [flag] if value is True else [flag, str(value)]
        args.script = Path(self.prog).stem
        args.experiment = [words[-1].removeprefix("--") for dest, words in given.items() if dest not in self.common]
        told = {
            dest: words[:1] if dest == "resume" else words
            for dest, words in given.items()
            if dest not in ("data", "checkpoints") or words[1] == "synthetic"
        }
        args.command = " ".join(["python", self.prog, *chain(*told.values())])
        given.pop("resume", None)
        args.resume_command = shlex.join(["python", sys.argv[0], *chain(*given.values()), "--resume"])
        if WORLD_SIZE > 1:
            args.resume_command = "the same torchrun command with --resume"
        args.lr_given = args.lr is not None
        args.lr = args.lr or self.recipe_lr
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            self.error("--tensorboard needs a package that is not installed: pip install tensorboard")
        return args


def positive_int(text: str) -> int:
    """Return a whole number of 1 or more, below 2**31."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def seed_int(text: str) -> int:
    """Return a whole number that PyTorch takes as a seed."""
    if not text.isdecimal() or not int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def positive_float(text: str) -> float:
    """Return a number above 0, finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
