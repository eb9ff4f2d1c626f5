"""Functions shared by the training scripts, in the order of a run.

They set up, load the data, make the schedule, train, test and compute the accuracy by class. Code that no experiment
changes is in harness/, one topic a module.
"""

import argparse

from harness.terminal import UserError, run

# isort: split
# PyTorch is imported after harness/, which handles a Ctrl-C during that import, see harness/__init__.py
import numpy as np
import torch
from torch import nn

from harness.checkpoints import Checkpoints
from harness.command_line import ArgumentParser
from harness.data import Data, load_data
from harness.devices import DTYPES, autocast, choose_device, choose_precision, keep_freed_memory
from harness.loader import Loader, epoch_seed
from harness.muon import Muon
from harness.processes import (
    LOCAL_RANK,
    RANK,
    WORLD_SIZE,
    add_over_processes,
    broadcast_buffers,
    join_processes,
)
from harness.training import Meter, TrainStep

__all__ = ["ArgumentParser", "Checkpoints", "Muon", "TrainStep", "UserError", "run"]  # for the scripts, from harness/

TEST_BATCH_SIZE = 500


def set_up(args: argparse.Namespace) -> torch.device:
    """Join torchrun's processes, if any, and return the device that this process trains on.

    Raises UserError if the machine has no such device, or fewer GPUs than processes.
    """
    keep_freed_memory()
    device = choose_device(args.device)
    if WORLD_SIZE > 1:
        if device.type == "mps":
            raise UserError("several processes cannot train on MPS; use --device cpu")
        if device.type == "cuda":
            if torch.cuda.device_count() <= LOCAL_RANK:
                raise UserError(f"there are more processes than the {torch.cuda.device_count()} GPUs; start fewer")
            device = choose_device(f"cuda:{LOCAL_RANK}")
        join_processes(device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # CUDA graphs are captured on the current device
    return device


def dataloaders(
    args: argparse.Namespace,
    device: torch.device,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    **augmentation,
) -> tuple[Data, Loader, Loader]:
    """Load `args.data` and return the dataset, its training loader and its test loader.

    With `args.holdout`, a tenth of the training images replaces the test images.

    mean, std: of each channel, for pixel values from 0 to 1. augmentation: flip, crop, reflect, jitter, cutout and
    transform of Loader. Raises UserError if the dataset cannot be read, or the device does not support the precision.
    """
    precision = choose_precision(args.precision, device)
    data = load_data(args.data)
    if args.holdout:
        data = data.hold_out()
    common = {"mean": mean, "std": std, "device": device, "dtype": DTYPES[precision]}
    order = {"training": True, "seed": args.seed}
    train_loader = Loader(data.train_images, data.train_labels, args.batch_size, **order, **augmentation, **common)
    test_loader = Loader(data.test_images, data.test_labels, TEST_BATCH_SIZE, **common)
    images = f"{len(data.train_labels)} training and {len(data.test_labels)} {data.tested_on} images"
    print(f"{images} of {len(data.classes)} classes ({data.source}), on {device} in {precision}", flush=True)
    return data, train_loader, test_loader


def triangular_schedule(
    optimizer: torch.optim.Optimizer, steps: int, peak: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a scheduler whose learning rate rises linearly to the optimizer's own, then falls linearly to 0.

    steps: the number of scheduler steps in a run, one an epoch or one a batch. Each has the rate at its middle.
    peak: the fraction of the run at which the rate is highest, from 0 to 1.
    """
    corners = [0, peak * steps, steps], [0, 1, 0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(np.interp(step + 0.5, *corners)))


def train(train_step: TrainStep, loader: Loader, epoch: int) -> tuple[float, float]:
    """Train for one epoch and return the mean loss and the accuracy in percent, measured while the network learns.

    Raises UserError if a loss is not finite.
    """
    train_step.model.train()
    loader.set_epoch(epoch)
    torch.manual_seed(epoch_seed(loader.seed, epoch) + RANK)  # dropout, and a Loader's transform
    with Meter(f"Train epoch:{epoch}", loader.batch_sizes, loader.device) as meter:
        for (images, labels), weight in zip(loader, loader.weights, strict=True):  # weight 1, except under torchrun
            loss, logits = train_step(images, labels, weight)
            meter.update(loss, logits, labels)
        metrics = meter.total()
    broadcast_buffers(train_step.model)  # rank 0's batch-norm statistics, under torchrun
    return metrics


@torch.inference_mode()
def test(model: nn.Module, loader: Loader, criterion: nn.Module, epoch: int) -> tuple[float, float]:
    """Test the network and return the mean loss and the accuracy in percent.

    Raises UserError if a loss is not finite.
    """
    model.eval()
    with Meter(f"test epoch:{epoch}", loader.batch_sizes, loader.device) as meter:
        for images, labels in loader:
            with autocast(images):
                logits = model(images)
                loss = criterion(logits, labels)
            meter.update(loss, logits, labels)
        return meter.total()


@torch.inference_mode()
def predict(model: nn.Module, loader: Loader) -> torch.Tensor:
    """Return the logits of a test loader's images, in their order: float32 of shape (N, classes), on the CPU."""
    model.eval()
    own_logits = []  # of this process's images
    for images, _ in loader:
        with autocast(images):
            own_logits.append(model(images).float())
    own_logits = torch.cat(own_logits)
    logits = torch.zeros(len(loader.labels), own_logits.shape[1], device=loader.device)
    logits[loader.positions.to(loader.device)] = own_logits
    add_over_processes(logits)  # an image's logits come from one process and are zero in the others
    return logits.cpu()


def confusion_matrix(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how many images of each class (row) are predicted as each class (column): int64, (classes, classes).

    logits: of shape (N, classes); labels: int64 of shape (N,).
    """
    classes = logits.shape[1]
    return torch.bincount(classes * labels + logits.argmax(1), minlength=classes**2).view(classes, classes)


def per_class_accuracy(confusion: torch.Tensor) -> torch.Tensor:
    """Return the percentage of each class's images that are predicted as it: float64 of shape (classes,)."""
    return 100 * confusion.diagonal().double() / confusion.sum(1)


def finish(checkpoints: Checkpoints, data: Data, model: nn.Module, test_loader: Loader) -> None:
    """Print the accuracy by class and, after training, write the run's record and draw its pictures."""
    logits = predict(model, test_loader)
    confusion = confusion_matrix(logits, test_loader.labels.cpu())
    checkpoints.finish(confusion, per_class_accuracy(confusion))
    if RANK == 0 and not checkpoints.args.evaluate:
        from harness.drawing import draw_run  # here, because it imports matplotlib, which would slow down every start

        draw_run(checkpoints.folder, logits, confusion, data)
    checkpoints.leave()
