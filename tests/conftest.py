"""Fixtures: the scripts as a user runs them, and folders of images to run them on."""

import hashlib
import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT.parent / "shared" / "cifar10" / "unpack.py"  # CIFAR-10 itself, where it lies beside the checkout
SCRIPTS = R1, R2, R3, R4, MOBILENET = (
    "cifar10_r1.py", "cifar10_r2.py", "cifar10_r3.py", "cifar10_r4.py", "train_mobilenetv2.py",
)  # fmt: skip
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# Each run of a script is a process of its own, forked from one that has torch imported: that import takes seconds.
os.environ["PYTHONPATH"] = str(ROOT)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["plot", "predict"])


def output(folder, stream):
    """The file with the "stdout" or "stderr" of the script that has run, or runs, in `folder`."""
    return folder.with_name(f"{folder.name}.{stream}")


def as_a_process(path, flags, folder, environment, before):
    """What `python path flags` does in `folder`, its output going into the files `stdout` and `stderr` beside it."""
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


@pytest.fixture
def start(tmp_path, request):
    """Starts a script in a folder of its own; returns the process, a multiprocessing.Process.

    before: a function of a module, called in the process before the script.
    """

    def start(name, *flags, before=None):
        flags, environment = [*map(str, flags)], dict(os.environ)
        if "cuda" not in request.path.name:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # what is promised to the last bit, is promised on the CPU
        process = PROCESSES.Process(target=as_a_process, args=(str(ROOT / name), flags, tmp_path, environment, before))
        process.start()
        return process

    return start


@pytest.fixture
def script(start, tmp_path):
    """Runs a script in that folder to its end; returns its `stdout` and its `stderr` as text."""

    def run(name, *flags, status=0, before=None):
        process = start(name, *flags, before=before)
        process.join(300)
        texts = {stream: output(tmp_path, stream).read_text() for stream in ("stdout", "stderr")}
        assert process.exitcode == status, texts["stderr"]
        return SimpleNamespace(**texts)

    return run


@pytest.fixture
def refused(script):
    """Runs a script that must be refused; returns the one line on stderr."""

    def run(name, *flags, before=None):
        done = script(name, *flags, status=2, before=before)
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


class Trap:
    """Where it is unpickled as any object is, the file `path` appears."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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


@pytest.fixture
def original(tmp_path):
    """A small archive in the original's format; returns its folder and the hashes that fit it."""
    rng, members, images = np.random.default_rng(0), {}, {}
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        images[name] = rng.integers(0, 256, (20, 3072), np.uint8)
        members[name] = pickle.dumps({"data": images[name], "labels": [i % 10 for i in range(20)]})
    members["batches.meta"] = pickle.dumps({"label_names": CIFAR10_CLASSES})
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in members.items():
            path = tmp_path / CIFAR10.base_folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            tar.add(path, f"{CIFAR10.base_folder}/{name}")
            path.unlink()
    path.parent.rmdir()

    class Small(CIFAR10):
        train_list = [[name, hashlib.md5(members[name]).hexdigest()] for name, _ in CIFAR10.train_list]  # noqa: RUF012
        test_list = [[name, hashlib.md5(members[name]).hexdigest()] for name, _ in CIFAR10.test_list]  # noqa: RUF012
        meta = CIFAR10.meta | {"md5": hashlib.md5(members["batches.meta"]).hexdigest()}

    content = archive.read_bytes()
    hashes = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "dataset": Small}
    return tmp_path, hashes, images
