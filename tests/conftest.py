"""Fixtures: the scripts as a user runs them, and folders of images to run them on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT.parent / "shared" / "cifar10" / "unpack.py"  # CIFAR-10 itself, where it lies beside the checkout


@pytest.fixture
def script(tmp_path):
    """Runs a script in a folder of its own; returns the finished process, with its output as text."""

    def run(name, *flags, status=0):
        command = [sys.executable, str(ROOT / name), *map(str, flags)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stderr
        return done

    return run


@pytest.fixture
def refused(script):
    """Runs a script that must be refused; returns the one line on stderr."""

    def run(name, *flags):
        done = script(name, *flags, status=2)
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{name}: error: "), done.stderr
        return done.stderr

    return run


def write_images(root, classes=("cat", "dog", "frog"), train=30, test=10, suffix=".png"):
    """Class folders of little pictures, `train` and `test` a class, whose class is their brightness."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60 * label, 60 * label + 80, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04d}{suffix}")
    return root


@pytest.fixture
def folders(tmp_path):
    return write_images(tmp_path / "pictures")


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """A folder with all of CIFAR-10 as `--data` takes it; the test is skipped where there is none."""
    if "CIFAR10_DIR" in os.environ:
        return Path(os.environ["CIFAR10_DIR"]).resolve()
    if not PACK.exists():
        pytest.skip("no CIFAR-10 here: CIFAR10_DIR is not set")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(PACK), str(folder)], check=True)
    return folder
