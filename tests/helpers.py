"""Helpers for the tests and their fixtures: the scripts' names, their processes, and what a run leaves."""

import contextlib
import csv
import fcntl
import functools
import multiprocessing
import os
import pty
import runpy
import struct
import subprocess
import sys
import termios
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT.parent / "shared" / "cifar10" / "unpack.py"  # for CIFAR-10 itself, if it is beside the checkout
SCRIPTS = R1, R2, R3, R4, R5, MOBILENET = (
    "cifar10_r1.py", "cifar10_r2.py", "cifar10_r3.py", "cifar10_r4.py", "cifar10_r5.py", "train_mobilenetv2.py",
)  # fmt: skip
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# Each run of a script is a process forked from one that has imported torch, because that import takes seconds.
os.environ["PYTHONPATH"] = str(ROOT)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["plot", "predict"])


def hide(package):
    """Return a function for `before` that makes a package look as if it were not installed."""
    return functools.partial(set_missing, package)


def set_missing(package):
    sys.modules[package] = None


def output(folder, stream):
    """Return the file with the "stdout" or "stderr" of the script that runs or has run in `folder`."""
    return folder.with_name(f"{folder.name}.{stream}")


def as_a_process(path, flags, folder, environment, before):
    """Do what `python path flags` does in `folder`, with the output in the files `stdout` and `stderr` beside it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = [path, *flags]
    if before:
        before()
    runpy.run_path(path, run_name="__main__")


def run_on_a_terminal(folder, name, *flags):
    """Run a script in `folder` on a terminal of 120 columns and return what it has printed there."""
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    process = subprocess.Popen(command, cwd=folder, stdout=theirs, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # Linux raises it when the other end is closed
        while some := os.read(terminal, 10_000):
            printed += some
    assert process.wait() == 0
    return printed.decode().replace("\r\n", "\n")


def write_images(root, classes=("cat", "dog", "frog"), train=30, test=10, suffix=".png"):
    """Write class folders of small pictures, `train` and `test` for each class, whose brightness is their class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                dark = 60 * label % 176
                pixels = rng.integers(dark, dark + 80, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04d}{suffix}")
    return root


def png(colour_type, channels, bits=16, side=32):
    """Return a black PNG, also of kinds that Pillow cannot write. One that is not 32x32 has only its header right."""
    rows = zlib.compress(bytes(1 + 32 * channels * bits // 8) * 32)
    header = struct.pack(">IIBBBBB", side, side, bits, colour_type, 0, 0, 0)
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


class Trap:
    """An object that creates the file `path` when it is unpickled without restrictions."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def log(folder):
    """Return the rows of log.csv without their seconds."""
    rows = list(csv.DictReader((folder / "log.csv").open()))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def wait_for_a_save(process, last):
    """Return once the process has saved an epoch, or has ended."""
    before = last.stat().st_mtime_ns if last.exists() else None
    while process.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
        time.sleep(0.002)
