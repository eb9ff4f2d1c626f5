"""Fixtures: the scripts as a user runs them, and folders of images to run them on."""

import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n runs a test on each core
    os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch reads it when it is imported

# isort: split
import numpy as np
import pytest
from filelock import FileLock
from helpers import CIFAR10_CLASSES, PACK, PROCESSES, ROOT, as_a_process, output, write_images
from torchvision.datasets import CIFAR10

from harness.data import load_data


@pytest.fixture
def start(tmp_path, request):
    """Return a function that starts a script in a folder of its own and returns its multiprocessing.Process.

    before: a function of a module, called in the process before the script. At the end of the test, what still runs is
    killed.
    """
    processes = []

    def start(name, *flags, before=None):
        flags, environment = [*map(str, flags)], dict(os.environ)
        if "cuda" not in request.path.name:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # only the CPU promises results to the last bit
        process = PROCESSES.Process(target=as_a_process, args=(str(ROOT / name), flags, tmp_path, environment, before))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def script(start, tmp_path):
    """Return a function that runs a script in this folder to its end and returns its `stdout` and `stderr` as text."""

    def run(name, *flags, status=0, before=None):
        process = start(name, *flags, before=before)
        process.join(300)
        assert process.exitcode is not None, f"{name} still runs after 300 s"
        texts = {stream: output(tmp_path, stream).read_text() for stream in ("stdout", "stderr")}
        assert process.exitcode == status, texts["stderr"]
        return SimpleNamespace(**texts)

    return run


@pytest.fixture
def refused(script):
    """Return a function that runs a script that must be refused and returns the one line on stderr."""

    def run(name, *flags, before=None):
        done = script(name, *flags, status=2, before=before)
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{Path(name).name}: error: "), done.stderr
        return done.stderr

    return run


@pytest.fixture
def folders(tmp_path):
    return write_images(tmp_path / "pictures")


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """Return a folder with CIFAR-10 for `--data`, or skip the test if there is none."""
    if "CIFAR10_DIR" in os.environ:
        return Path(os.environ["CIFAR10_DIR"]).resolve()
    if not PACK.exists():
        pytest.skip("no CIFAR-10 here: CIFAR10_DIR is not set")
    folder = tmp_path_factory.getbasetemp() / "cifar10"
    if "PYTEST_XDIST_WORKER" in os.environ:  # one folder for all workers
        folder = folder.parents[1] / "cifar10"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            subprocess.run([sys.executable, str(PACK), f"{folder}.new"], check=True)
            os.rename(f"{folder}.new", folder)
    return folder


@pytest.fixture(scope="session")
def cifar10_data(cifar10):
    """Return CIFAR-10 in memory."""
    return load_data(str(cifar10))


@pytest.fixture
def original(tmp_path):
    """Write a small archive in the original's format. Return its folder, the hashes that fit it, and its images."""
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
