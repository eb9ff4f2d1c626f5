# ruff: noqa: F401, F811, RUF100 -- names that move to harness/ stay importable from here until all have moved
"""What the training scripts share, in the order in which a run meets it:
errors, the command line, data, the loader, one epoch of training and of testing, per-class accuracy, checkpoints."""

import argparse
import csv
import ctypes
import hashlib
import http.client
import importlib.util
import io
import json
import math
import os
import platform
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import make_dataset
from torchvision.datasets.utils import check_integrity

from harness.checkpoints import PRINTED, Checkpoints, commit, record_text
from harness.command_line import ArgumentParser, positive_float, positive_int
from harness.data import Data, images_under, list_images, load_data, read_class_folders, read_image, read_original
from harness.devices import (
    DTYPES,
    autocast,
    choose_device,
    choose_precision,
    device_name,
    keep_freed_memory,
    peak_memory,
    precision_of,
)
from harness.download import (
    CIFAR10_SHA256,
    CIFAR10_SIZE,
    CIFAR10_SOURCES,
    CONNECT_SECONDS,
    FAIR_SECONDS,
    JUDGE_SECONDS,
    REPORT_SECONDS,
    STALL_SECONDS,
    Slow,
    Unusable,
    answer,
    download,
    fetch,
    host,
    prepare,
    size_of,
    unpack,
)
from harness.files import Damaged, read_checkpoint, sha256_of, write_checkpoint, write_whole
from harness.loader import Loader, epoch_seed
from harness.processes import RANK, WORLD_SIZE, attempt, join_processes, summed
from harness.synthetic import SHAPES, make_synthetic
from harness.terminal import CommandLine, Interrupted, UserError, end, handle_signals, printable, progress_bar, run
from harness.training import Meter, TrainStep

# ---------------------------------------------------------------------------------------------------- loader


TEST_BATCH_SIZE = 500


def set_up(args):
    """Joins the processes that torchrun has started, if it has; returns the torch.device that this one trains on.

    Raises UserError if the machine has no such device, or too few.
    """
    keep_freed_memory()
    device = choose_device(args.device)
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        join_processes(device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # where CUDA graphs are captured
    return device


def dataloaders(args, device, mean, std, flip=False, crop=False, cutout=0):
    """The training and the test Loader of `args.data`; the last three augment the training images. Raises UserError.

    mean, std: of the channels of an image with values from 0 to 1; flip, crop, cutout: see Loader.
    """
    precision = choose_precision(args.precision, device)
    data = load_data(args.data)
    common = {"mean": mean, "std": std, "device": device, "dtype": DTYPES[precision]}
    train_loader = Loader(data, "train", args.batch_size, seed=args.seed, flip=flip, crop=crop, cutout=cutout, **common)
    test_loader = Loader(data, "test", TEST_BATCH_SIZE, **common)
    images = f"{len(data.train_labels)} training and {len(data.test_labels)} test images"
    print(f"{images} of {len(data.classes)} classes ({data.source}), on {device} in {precision}", flush=True)
    return train_loader, test_loader


# ------------------------------------------------------------------------------------------ train and test


def triangular_schedule(optimizer, epochs, peak):
    """A scheduler, stepped after each epoch: the rate rises in a line to the optimizer's own, and falls in one to 0.

    peak: where in the run it is highest, from 0 to 1. An epoch has the rate of its middle.
    """
    corners = [0, peak * epochs, epochs], [0, 1, 0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(np.interp(epoch + 0.5, *corners)))


def train(step, loader, epoch):
    """Trains for one epoch; returns the mean loss and the accuracy in percent over its images, as it went.

    Raises UserError once the loss is no longer finite.
    """
    step.model.train()
    loader.set_epoch(epoch)
    torch.manual_seed(epoch_seed(loader.seed, epoch) + RANK)  # dropout
    with Meter(f"Train epoch:{epoch}", loader) as meter:
        for (images, labels), weight in zip(loader, loader.weights, strict=True):
            loss, logits = step(images, labels, weight)
            meter.update(loss, logits, labels)
        total = meter.total()
    if WORLD_SIZE > 1:  # batch-norm's statistics: from here on, the first process's are everybody's
        for buffer in step.model.buffers():
            dist.broadcast(buffer, 0)
    return total


@torch.inference_mode()
def test(model, loader, criterion, epoch):
    """Tests `model`; returns the mean loss and the accuracy in percent. Raises UserError if the loss is not finite."""
    model.eval()
    with Meter(f"test epoch:{epoch}", loader) as meter:
        for images, labels in loader:
            with autocast(images):
                logits = model(images)
                loss = criterion(logits, labels)
            meter.update(loss, logits, labels)
        return meter.total()


@torch.inference_mode()
def predict(model, loader):
    """The logits of a test loader's images, float32 of shape (N, classes) on the CPU; in every process all of them."""
    model.eval()
    mine = []
    for images, _ in loader:
        with autocast(images):
            mine.append(model(images).float())
    logits = torch.zeros(len(loader.labels), len(loader.classes), device=loader.device)
    logits[loader.mine.to(loader.device)] = torch.cat(mine)
    if WORLD_SIZE > 1:
        dist.all_reduce(logits)  # each image's are those of one process, and zero in the others
    return logits.cpu()


def confusion_matrix(logits, labels):
    """How many images of each class (row) are taken for each class (column): int64 of shape (classes, classes)."""
    classes = logits.shape[1]
    return torch.bincount(classes * labels + logits.argmax(1), minlength=classes**2).view(classes, classes)


def per_class_accuracy(confusion):
    """Of each class, how many percent of its images are taken for it: float64 of shape (classes,)."""
    return 100 * confusion.diagonal().double() / confusion.sum(1)


def finish(checkpoints, model, test_loader):
    """Prints the accuracy by class, writes the run's record and draws its pictures, the latter not after --evaluate."""
    logits = predict(model, test_loader)
    confusion = confusion_matrix(logits, test_loader.labels.cpu())
    checkpoints.finish(confusion, per_class_accuracy(confusion))
    if not checkpoints.args.evaluate:
        import plot  # and with it matplotlib, which would make every start slower

        plot.draw(checkpoints.folder, logits, test_loader)


# ----------------------------------------------------------------------------------------------- checkpoints
