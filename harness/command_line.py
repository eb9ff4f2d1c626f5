"""The flags that every training script has. Parsing only: nothing here touches a device, a file or a process."""

import argparse
import importlib.util
import math
import shlex
import sys
import urllib.parse
from pathlib import Path

from harness.devices import DTYPES
from harness.processes import WORLD_SIZE
from harness.terminal import CommandLine, nonempty_path


class ArgumentParser(CommandLine):
    """The flags that every training script has, with the script's own recipe as their defaults.

    A script adds the flags of its experiment with `add_argument`.
    """

    def __init__(
        self,
        description: str,
        *,
        epochs: int | dict[str, int],
        batch_size: int | dict[str, int],
        lr: float | dict[str, float],
        precision: str = "auto",
    ):
        """Take the recipe's numbers. Each is a number, or a dict with one for each experiment.

        From a dict the script picks its own number, if the flag is not given, which leaves None in the namespace.
        """
        super().__init__(description)
        add = self.add_argument
        self.add_data("CIFAR-10 or class folders, or 'synthetic' (default: data)")
        (count, counts), (size, sizes), (self.recipe_lr, rates) = map(default_of, (epochs, batch_size, lr))
        add("--epochs", type=positive_int, default=count, metavar="N", help=f"train for N epochs (default: {counts})")
        add("--batch-size", type=positive_int, default=size, metavar="N", help=f"(default: {sizes})")
        add("--lr", type=positive_float, metavar="X", help=f"learning rate (default: {rates}, or a resumed run's own)")
        add("--seed", type=seed_int, default=0, metavar="N", help="of everything that is random (default: %(default)s)")
        self.add_device("cpu, cuda, cuda:N, mps or auto (default: auto: CUDA, then MPS, then CPU)")
        add("--precision", choices=["auto", *DTYPES], default=precision, help="see docs/runs.md (default: %(default)s)")
        add("--checkpoints", type=nonempty_path, default="checkpoints", metavar="DIR", help="(default: checkpoints)")
        add("--holdout", action="store_true", help="hold out a tenth of the training images and test on them")
        add("--tensorboard", action="store_true", help="also write the log for TensorBoard, into the run's folder")
        mode = self.add_mutually_exclusive_group()
        add = mode.add_argument
        add(
            "--resume",
            nargs="?",
            type=nonempty_path,
            const=True,
            metavar="FILE",
            help="resume from this run's last.pt, or from FILE",
        )
        add(
            "--evaluate",
            nargs="?",
            type=nonempty_path,
            const=True,
            metavar="FILE",
            help="only test this run's last.pt, or FILE",
        )
        self.common = {action.dest for action in self._actions}

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Return the flags, and the names and commands of the run.

        script: the script's name. experiment: the script's name with its own flags. own_flags: the names of these flags
        in the namespace. suffix: the rest of the run's name. command: the command line without its paths.
        resume_command: the command line that resumes the run. lr_given: whether --lr was given.
        """
        argv = sys.argv[1:] if argv is None else argv
        args = super().parse_args(argv)
        own = [action for action in self._actions if action.dest not in self.common]
        args.own_flags = [action.dest for action in own]
        args.script = Path(self.prog).stem
        args.experiment = "-".join([args.script, *filter(None, (name_of(action, args, own) for action in own))])
        args.suffix = run_suffix(args.seed, args.holdout, args.data)
        told = without(argv, "--data", "--checkpoints", "--resume", "--evaluate")
        told += ["--data", "synthetic"] * (args.data == "synthetic") + ["--resume"] * bool(args.resume)
        args.command = shlex.join(["python", self.prog, *told])
        args.resume_command = shlex.join(["python", sys.argv[0], *without(argv, "--resume"), "--resume"])
        if WORLD_SIZE > 1:
            args.resume_command = "the same torchrun command with --resume"
        args.lr_given = args.lr is not None
        args.lr = args.lr or self.recipe_lr
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            self.error("--tensorboard needs a package that is not installed: pip install tensorboard")
        return args


def default_of(number: float | dict[str, float]) -> tuple[float | None, str]:
    """Return a flag's default and its text for the help. With a number for each experiment, the default is None."""
    if isinstance(number, dict):
        return None, ", ".join(f"{name} {own}" for name, own in number.items())
    return number, str(number)


def run_suffix(seed: int, holdout: bool, data: str) -> str:
    """Return the part of a run's name after its experiment, such as "-seed2"."""
    parts = {f"-seed{seed}": seed != 0, "-holdout": holdout, "-synthetic": data == "synthetic"}
    return "".join(part for part, is_so in parts.items() if is_so)


def name_of(action: argparse.Action, args: argparse.Namespace, own: list[argparse.Action]) -> str | None:
    """Return the part that one of the script's own flags adds to the run's name, or None at its default.

    A choice stands for itself, unless it could be read as another flag. Other values follow their flag's name, so that
    no two command lines give the same name.
    """
    value, default = getattr(args, action.dest), action.default
    if isinstance(default, str) and callable(action.type):  # as argparse does
        default = action.type(default)
    if value is None or value == default:
        return None
    flags = [option.lstrip("-") for option in action.option_strings] or [action.dest]
    if action.nargs == 0 and action.const not in (None, value, *(value if isinstance(value, list) else ())):
        return None  # another flag has set it
    if isinstance(value, bool):  # --flip, --no-flip, or both
        return next((flag for flag in flags if flag.startswith("no-") != value), flags[0])
    text = "+".join(map(quote, value)) if isinstance(value, list | tuple) else quote(value)
    others = [other for other in own if other is not action]
    names = [option.lstrip("-") for other in others for option in other.option_strings or [other.dest]]
    choices = [quote(choice) for other in others for choice in other.choices or ()]
    taken = ("seed", "holdout", "synthetic", *names, *choices)
    bare = text.replace("%2D", "-")
    if action.choices is not None and bare and not any(word.startswith(taken) for word in bare.split("-")):
        return bare
    one_begins_another = any(name.startswith(flags[0]) or flags[0].startswith(name) for name in names)
    return f"{flags[0]}{'=' if one_begins_another else ''}{text}"


def quote(value: object) -> str:
    """Return a flag's value for a run's name: a slash becomes %2F, and in text a hyphen, which separates flags, %2D."""
    text = urllib.parse.quote(str(value), safe=" =")
    return text if isinstance(value, int | float) else text.replace("-", "%2D")


def without(words: list[str], *flags: str) -> list[str]:
    """Return the words of a command line without these flags and their values."""
    kept, is_value = [], False
    for word in words:
        is_value = is_value and not word.startswith("-")
        if word in flags or is_value:
            is_value = word in flags
        elif not word.startswith(tuple(f"{flag}=" for flag in flags)):
            kept.append(word)
    return kept


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
    """Return a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
