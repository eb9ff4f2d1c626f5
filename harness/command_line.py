"""The flags that every training script has."""

import argparse
import importlib.util
import math
import shlex
import sys
from pathlib import Path

from harness.devices import (
    DTYPES,
)
from harness.processes import WORLD_SIZE
from harness.terminal import CommandLine


class ArgumentParser(CommandLine):
    """The flags that every training script has, with the script's own recipe as their defaults.

    A script adds the flags of its experiment with `add_argument`; together with the script's name they name the run.
    """

    def __init__(self, description, *, epochs, batch_size, lr, precision="auto"):
        """epochs: how many, or a dict from the experiment to how many, of which the script takes its own."""
        super().__init__(description)
        add = self.add_argument
        add("--data", default="data", metavar="DIR", help="CIFAR-10 or class folders, or 'synthetic' (default: data)")
        counts = epochs
        if isinstance(epochs, dict):
            counts, epochs = ", ".join(f"{name} {count}" for name, count in epochs.items()), None
        add("--epochs", type=positive_int, default=epochs, metavar="N", help=f"(default: {counts})")
        add("--batch-size", type=positive_int, default=batch_size, metavar="N", help="(default: %(default)s)")
        add("--lr", type=positive_float, metavar="X", help=f"learning rate (default: {lr}, or a resumed run's own)")
        add("--seed", type=seed, default=0, metavar="N", help="(default: %(default)s)")
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

    def parse_args(self, argv=None):
        """The parsed flags, and beside them

        run: str, the run's name, from the script and the experiment's own flags; script: str, the script's;
        command: str, the command line without its paths; resume_command: str, the one that goes on with the run;
        lr_given: bool, whether --lr was given.
        """
        args = super().parse_args(argv)
        args.script = Path(self.prog).stem
        name, command, resume_command = [args.script], ["python", self.prog], sys.argv[:1]
        for action in self._actions:
            flag, value = action.option_strings[0], getattr(args, action.dest, None)
            given = value not in (None, action.default)
            if given and action.dest not in self.common:
                name.append(flag.removeprefix("--") if value is True else str(value))
            if given and action.dest == "resume":
                command.append(flag)
            elif given:
                words = [flag] if value is True else [flag, str(value)]
                resume_command += words
                if action.dest not in ("data", "checkpoints") or value == "synthetic":
                    command += words
        args.run = "-".join(name) + "-synthetic" * (args.data == "synthetic")
        args.command = " ".join(command)
        args.resume_command = shlex.join(["python", *resume_command, "--resume"])
        if WORLD_SIZE > 1:
            args.resume_command = "the same torchrun command with --resume"
        args.lr_given = args.lr is not None
        args.lr = args.lr or self.recipe_lr
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            self.error("--tensorboard needs a package that is not installed: pip install tensorboard")
        return args


def positive_int(text):
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def seed(text):
    if not text.isdecimal() or not int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def positive_float(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
