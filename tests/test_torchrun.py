"""The scripts on several processes, started by torchrun."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import R1, R2, R4, R5, ROOT, log, weights, write_images

import harness.loader
import harness.training
from harness.data import load_data
from harness.terminal import UserError
from predict import load_classifier

pytestmark = pytest.mark.long
STARTED = []  # processes of this test


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", train=31, test=11)  # 93 and 33 images: shares differ by one


def start_python(folder, *arguments, **variables):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    STARTED.append(subprocess.Popen([sys.executable, *map(str, arguments)], cwd=folder, env=environment, **pipes))
    return STARTED[-1]


def begin(folder, torchrun, name, *flags):
    return start_python(folder, "-m", "torch.distributed.run", *torchrun.split(), ROOT / name, *flags)


def begin_without_torchrun(folder, rank, port, name, *flags):
    """Start one of a script's two processes, with the variables that torchrun would set."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    return start_python(folder, ROOT / name, *flags, **ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@pytest.fixture(autouse=True)
def no_process_stays():
    """Kill what a failed test has left running."""
    yield
    while STARTED:
        process = STARTED.pop()
        for pid in [*children(process), process.pid] if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def torchrun(tmp_path):
    """Return a function that runs a script on this many processes and returns its output, or its error if it fails."""

    def run(processes, name, *flags, status=0):
        process = begin(tmp_path, f"--standalone --nproc-per-node={processes}", name, *flags)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == status and "Warning" not in stderr, stderr
        return stdout if status == 0 else stderr

    return run


def distance(one, other):
    one, other = weights(one), weights(other)
    return max((one[key] - other[key]).abs().max().item() for key in one)


def test_the_recipe_is_the_recipe(torchrun, script, tmp_path, data):
    """Without batch-norm, several processes end with the weights of one process, except for rounding."""
    flags = ["--flip", "--batch-size", 32, "--lr", 0.02, "--epochs", 3, "--checkpoints"]
    script(R1, *flags, "one")
    out = torchrun(3, R1, *flags, "several")
    assert out.count("93 training and 33 test images") == out.count("Accuracy of the network") == 1
    one, several = tmp_path / "one/cifar10_r1-flip", tmp_path / "several/cifar10_r1-flip"
    assert distance(one / "last.pt", several / "last.pt") < 1e-6
    for ours, theirs in zip(log(several), log(one), strict=True):
        assert [float(value) for value in ours.values()] == pytest.approx([*map(float, theirs.values())], rel=1e-5)


def test_another_number_of_processes_goes_on(torchrun, script, tmp_path, data):
    flags = [R1, "--batch-size", 32, "--lr", 0.02, "--resume", "--epochs"]
    script(*flags, 4, "--checkpoints", "one")
    torchrun(2, *flags, 1)
    script(*flags, 2)
    assert "resuming checkpoints/cifar10_r1/last.pt after epoch 2\n" in torchrun(3, *flags, 4)
    assert distance(tmp_path / "one/cifar10_r1/last.pt", tmp_path / "checkpoints/cifar10_r1/last.pt") < 1e-6


def test_a_network_with_batch_norm(torchrun, script, data):
    flags = [R2, "--batch-size", 32, "--lr", 1e-4, "--epochs", 1]
    out = torchrun(2, *flags)
    table = out[out.index("Accuracy") : out.index("Best")]
    assert table in script(*flags, "--evaluate").stdout
    assert table in torchrun(2, *flags, "--evaluate")


def test_the_network_that_is_tested_is_the_one_that_is_saved(torchrun, tmp_path, data):
    """Batch-norm's statistics differ between processes while they train."""
    torchrun(2, R2, "--batch-size", 32, "--lr", 1e-3, "--epochs", 1, "--precision", "fp32")
    folder = tmp_path / "checkpoints/cifar10_r2"
    classifier, test = load_classifier(folder / "last.pt"), load_data(data)
    loss = torch.nn.functional.cross_entropy(classifier(test.test_images), test.test_labels).item()
    assert float(log(folder)[0]["test_loss"]) == pytest.approx(loss, rel=1e-4)


def test_processes_resume_alike(torchrun, tmp_path, data):
    """The optimizer's state and the schedule, which r5 steps after each batch, go on in every process."""
    flags = [R5, "--batch-size", 32, "--epochs", 3, "--precision", "fp32"]
    torchrun(2, *flags)
    folder = tmp_path / "checkpoints/cifar10_r5"
    before, whole = log(folder), weights(folder / "last.pt")
    (folder / "last.previous.pt").replace(folder / "last.pt")  # as if interrupted in the last epoch
    assert "after epoch 2\n" in torchrun(2, *flags, "--resume")
    after = weights(folder / "last.pt")
    assert all(torch.equal(after[key], whole[key]) for key in whole)
    assert log(folder)[-1]["test_loss"] == before[-1]["test_loss"]


def test_a_mistake_is_said_once(torchrun, data):
    line = "cifar10_r1.py: error: no checkpoints/cifar10_r1/last.pt to evaluate; train this run first, or name a file"
    assert torchrun(2, R1, "--evaluate", status=1).count(line) == 1
    line = "cifar10_r2.py: error: --batch-size 3: batch-norm cannot train on a single image per process; use 5 or more"
    assert torchrun(2, R2, "--batch-size", 3, status=1).count(line) == 1


def test_too_few_images_for_the_processes(monkeypatch):
    monkeypatch.setattr(harness.loader, "WORLD_SIZE", 3)
    images, labels = torch.zeros(9, 3, 32, 32, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64)
    common = {"mean": (0,) * 3, "std": (1,) * 3, "device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(UserError, match="3 processes cannot share 2 images for training"):
        harness.loader.Loader(images, labels, 2, training=True, **common)
    with pytest.raises(UserError, match="3 processes cannot share 1 image for testing"):
        harness.loader.Loader(images[:1], labels[:1], 500, **common)
    with pytest.raises(UserError, match="3 processes cannot share 2 images for testing"):
        harness.loader.Loader(images[:8], labels[:8], 2, **common)


def test_batches_that_are_smaller_than_asked_for(monkeypatch):
    """Of 35 images and batches of at most 17, the smallest has 11, which 8 processes share."""
    monkeypatch.setattr(harness.training, "WORLD_SIZE", 8)
    step = SimpleNamespace(model=torch.nn.BatchNorm2d(3))
    with pytest.raises(UserError, match="cannot train on a single image per process; use fewer processes"):
        harness.training.TrainStep.check_batch_size(step, 17, 1)


@pytest.mark.parametrize(
    "name, flags, other, words",
    [
        (R1, ["--seed", 0], ["--seed", 1], "--seed 1, this one has 0;"),
        (R1, ["--precision", "fp32"], ["--precision", "bf16"], "--precision bf16, this one has fp32;"),
        (R1, [], ["--evaluate"], "--evaluate True, this one has False;"),
        (R4, [], ["--stem", "cifar"], "run cifar10_r4-cifar, this one has cifar10_r4;"),  # networks of other shapes
    ],
)
def test_processes_of_different_experiments_do_not_train_together(tmp_path, data, name, flags, other, words):
    port = free_port()
    processes = [begin_without_torchrun(tmp_path, rank, port, name, *own) for rank, own in enumerate((flags, other))]
    errors = "".join(process.communicate(timeout=120)[1] for process in processes)
    assert all(process.returncode != 0 for process in processes) and not (tmp_path / "checkpoints").exists()
    assert f"process 1 was started with {words} start all with the same command\n" in errors, errors


def test_a_process_that_waits_for_another_ends_at_once(tmp_path, data):
    """Otherwise torchrun waits 30 seconds, for example after a process without a GPU has ended."""
    port = free_port()
    process = begin_without_torchrun(tmp_path, 0, port, R1, "--data", data)
    connect_to(port, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def connect_to(port, process):
    """Wait until the process listens on the port."""
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None
        time.sleep(0.1)


def children(process):
    return [*map(int, subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split())]


def wait_for_the_first_save(tmp_path, *processes):
    last = tmp_path / "checkpoints/cifar10_r1/last.pt"
    while not last.exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    return last


def test_torchrun_restarts_a_run_that_lost_a_process(tmp_path, data):
    flags = ["--batch-size", 32, "--epochs", 200, "--resume"]
    process = begin(tmp_path, "--standalone --nproc-per-node=2 --max-restarts=1", R1, *flags)
    last = wait_for_the_first_save(tmp_path, process)
    os.kill(children(process)[-1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "resuming checkpoints/cifar10_r1/last.pt after epoch" in stdout
    assert torch.load(last, weights_only=True)["epoch"] == 200


def two_nodes(tmp_path, *flags, restarts=0):
    """Start r1 with these flags on two nodes and return their processes."""
    port = free_port()
    torchrun = f"--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{port} --rdzv-id=test"
    return [begin(tmp_path, f"{torchrun} --max-restarts={restarts}", R1, *flags) for _ in range(2)]


def test_two_nodes_go_on_after_one_lost_its_process(tmp_path, data):
    nodes = two_nodes(tmp_path, "--batch-size", 32, "--epochs", 200, "--resume", restarts=3)
    last = wait_for_the_first_save(tmp_path, *nodes)
    os.kill(children(nodes[1])[0], signal.SIGKILL)
    for node in nodes:
        assert node.wait(120) == 0
    out = "".join(node.stdout.read() for node in nodes)
    assert "resuming checkpoints/cifar10_r1/last.pt after epoch" in out and out.count("Accuracy of the network") == 1
    assert torch.load(last, weights_only=True)["epoch"] == 200


def test_a_node_that_dies_ends_the_run(tmp_path, data):
    nodes = two_nodes(tmp_path, "--batch-size", 32, "--epochs", 100_000)
    last = wait_for_the_first_save(tmp_path, *nodes)
    for pid in [nodes[1].pid, *children(nodes[1])]:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    _, stderr = nodes[0].communicate(timeout=60)
    assert nodes[0].returncode != 0 and time.monotonic() - began < 45
    assert "cifar10_r1.py: error: the connection to another process is lost; its own error says why (" in stderr
    nodes[1].wait()
    assert torch.load(last, weights_only=True)["epoch"] >= 1
