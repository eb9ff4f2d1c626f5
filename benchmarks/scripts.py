"""The benchmarks' command line, and what a script trains and tests with, taken from the script itself."""

import argparse
import importlib
import signal
import sys
import tempfile
from typing import NamedTuple

import utils

import torch
from torch import nn

from harness.data import Data, load_data
from harness.devices import choose_device
from harness.loader import Loader
from harness.terminal import CommandLine, UserError
from harness.training import TrainStep

IMAGES = {  # in a round of training, which takes some seconds on a CPU. A GPU gets GPU_FACTOR times as many
    "cifar10_r1.py --flip --batch-size 4": 4_000,
    "cifar10_r1.py --flip": 25_600,
    "cifar10_r2.py --crop": 2_560,
    "cifar10_r4.py": 2_560,
    "cifar10_r4.py --stem cifar": 1_024,
    "cifar10_r4.py --stem cifar-nopool": 512,
    "cifar10_r5.py": 3_072,
    "train_mobilenetv2.py": 768,
}
GPU_FACTOR = 20


class BenchmarkLine(CommandLine):
    """The command line of a benchmark: --data, --device, --only, and the benchmark's own flags."""

    def __init__(self, description: str):
        super().__init__(description)
        self.add_data("as for the scripts (default: data)")
        self.add_device("as for the scripts (default: auto)")
        self.add_argument(
            "--only", nargs="+", default=[""], metavar="WORD", help="only scripts whose command contains one of these"
        )

    def parse(self) -> tuple[argparse.Namespace, list[str], Data, torch.device]:
        """Return the flags, the chosen commands, the dataset and the device. Raise UserError if --only fits none."""
        args = self.parse_args()
        names = {command: command.removeprefix("cifar10_") for command in IMAGES}  # in which r1 is not part of cifar10
        commands = [command for command, name in names.items() if any(word in name for word in args.only)]
        if not commands:
            raise UserError(f"--only {' '.join(args.only)} is in none of {'; '.join(IMAGES)}")
        return args, commands, load_data(args.data), choose_device(args.device)


def first_images(data: Data, command: str, device: torch.device, training: bool = True) -> Data:
    """Return the dataset cut to the images of one round of that script. A round of testing takes twice as many."""
    images = IMAGES[command] * (GPU_FACTOR if device.type == "cuda" else 1) * (1 if training else 2)
    return data._replace(
        train_images=data.train_images[:images],
        train_labels=data.train_labels[:images],
        test_images=data.test_images[:images],
        test_labels=data.test_labels[:images],
    )


class Prepared(NamedTuple):
    """The arguments that a script passes to `utils.train` and `utils.test`."""

    train_step: TrainStep
    train_loader: Loader
    model: nn.Module
    test_loader: Loader
    criterion: nn.Module


class FirstEpoch(Exception):
    """Raised in place of a script's first epoch."""


def prepare(command: str, data: Data, device: torch.device, precision: str | None = None) -> Prepared:
    """Run a script on these data up to its first epoch. Return what it would train and test with.

    precision: for --precision, or None for the script's own. This replaces functions of utils in this process.
    """
    handed_over, handlers = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def train(train_step, train_loader, epoch):
        handed_over.extend([train_step, train_loader])
        return 0.0, 0.0

    def test(model, test_loader, criterion, epoch):
        handed_over.extend([model, test_loader, criterion])
        raise FirstEpoch

    utils.load_data, utils.train, utils.test = lambda name: data, train, test
    script, *flags = command.split()
    with tempfile.TemporaryDirectory() as checkpoints:
        sys.argv = [script, *flags, "--device", str(device), "--checkpoints", checkpoints]
        sys.argv += ["--precision", precision] if precision else []
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except FirstEpoch:
            for number, handler in handlers.items():  # the script's own would advise to resume it
                signal.signal(number, handler)
            return Prepared(*handed_over)
