"""The scripts and the training step on a GPU."""

import functools
import subprocess
import sys

import utils

import pytest
import torch
from helpers import MOBILENET, R1, R2, R3, R4, R5, ROOT
from torch import nn

from harness.data import load_data
from harness.devices import DTYPES
from harness.loader import Loader
from harness.training import Meter
from mean_and_std import get_mean_and_std
from models import MobileNetV2, ResNet18, WhitenedCNN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    "command", [[R1], [R2, "--crop"], [R4, "--stem", "cifar"], [R5], [R5, "--tta"], [MOBILENET]], ids=str
)
def test_every_script_trains_in_every_precision(script, folders, command, precision):
    name, *flags = [*command, "--data", folders, "--batch-size", 8, "--lr", 1e-3, "--precision", precision]
    out = script(name, *flags, "--epochs", 2).stdout
    assert f"on cuda in {precision}\n" in out and "\nepoch:2/2 " in out
    if name == R1:
        assert "\nepoch:3/3 " in script(name, *flags, "--epochs", 3, "--resume").stdout
    if name == R2:
        assert "\nepoch:3/3 " in script(R3, *flags[1:], "--epochs", 3, "--resume").stdout


def test_from_cuda_to_the_cpu_and_back(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--lr", 0.02]
    script(*flags, "--epochs", 2, "--device", "cuda")
    script(*flags, "--epochs", 4, "--device", "cpu", "--resume")
    out = script(*flags, "--epochs", 6, "--device", "cuda", "--resume").stdout
    assert "after epoch 4\n" in out and "\nepoch:6/6 " in out
    for device in ("cuda", "cpu"):
        evaluated = script(*flags, "--evaluate", "--device", device).stdout
        assert out[out.index("Accuracy") : out.index("Best")] == evaluated[evaluated.index("Accuracy") :]


def trained(model, precision, warm_up=utils.TrainStep.WARM_UP, epochs=2):
    """Return a TrainStep that has run some epochs on the synthetic images, and its loader."""
    data, mean = load_data("synthetic"), (0.5, 0.5, 0.5)
    common = {"mean": mean, "std": mean, "device": CUDA, "dtype": DTYPES[precision]}
    loader = Loader(data.train_images, data.train_labels, 128, training=True, flip=True, crop=4, cutout=8, **common)
    torch.manual_seed(0)
    model = model().to(CUDA)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(model, WhitenedCNN):  # as in r5
        optimizer = utils.Muon(learnt, lr=0.02, momentum=0.6, dtype=DTYPES[precision])
    else:
        optimizer = torch.optim.SGD(learnt, lr=0.02, momentum=0.9, fused=True)
    scheduler = utils.triangular_schedule(optimizer, epochs * len(loader), 0.5)
    step = utils.TrainStep(model, nn.CrossEntropyLoss(), optimizer, DTYPES[precision], scheduler)
    step.WARM_UP = warm_up
    for epoch in range(1, epochs + 1):
        utils.train(step, loader, epoch)
    return step, loader


@pytest.mark.parametrize(
    "model, precision",
    [
        (ResNet18, "bf16"),
        (ResNet18, "fp32"),
        (MobileNetV2, "fp16"),
        (WhitenedCNN, "bf16"),
        (functools.partial(WhitenedCNN, mirrored=True), "bf16"),
    ],
)
def test_a_captured_step_is_the_step(monkeypatch, model, precision):
    """The weights are the same to the last bit, in little more memory.

    That is with dropout, a learning rate that changes, and the scaler's skipped steps.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    weights, memory = [], []
    for warm_up in (10**9, utils.TrainStep.WARM_UP):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step, _ = trained(model, precision, warm_up)
        assert len(step.graphs) == (0 if warm_up == 10**9 else 2)  # batches of 126 and 127
        weights.append(torch.cat([p.detach().flatten() for p in step.model.parameters()]))
        memory.append(torch.cuda.max_memory_reserved())
        del step
    assert torch.equal(*weights)
    assert memory[1] < 1.5 * memory[0]


def test_every_device_draws_alike():
    data, mean = load_data("synthetic"), (0.5, 0.5, 0.5)
    common = {"mean": mean, "std": mean, "dtype": torch.float32, "training": True}
    common |= {"flip": "alternating", "crop": 4, "reflect": True, "jitter": 0.1, "cutout": 8}
    ours, theirs = (
        Loader(data.train_images, data.train_labels, 128, device=device, **common)
        for device in (CUDA, torch.device("cpu"))
    )
    for (images, labels), (expected_images, expected_labels) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(images.cpu(), expected_images)
        assert torch.equal(labels.cpu(), expected_labels)


def test_nothing_waits_for_the_gpu_inside_an_epoch(monkeypatch):
    step, loader = trained(ResNet18, "bf16", epochs=1)
    monkeypatch.setattr(Meter, "REFRESH_SECONDS", 1e9)
    read = Meter.read

    def read_at_the_end(meter):
        torch.cuda.set_sync_debug_mode("default")
        assert meter.seen == len(loader.labels)
        return read(meter)

    monkeypatch.setattr(Meter, "read", read_at_the_end)
    try:
        torch.cuda.set_sync_debug_mode("error")
        utils.train(step, loader, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_is_one_line(refused):
    """The script may take a fiftieth of the GPU's memory, since other tests may use the rest."""
    limit = functools.partial(torch.cuda.set_per_process_memory_fraction, 0.02)
    flags = ["--data", "synthetic", "--stem", "cifar-nopool", "--batch-size", 4000, "--epochs", 1]
    line = refused(R4, *flags, before=limit)
    assert "error: out of memory on the GPU; use --device cpu, or train with a smaller --batch-size" in line


def test_the_other_commands(script, tmp_path, folders):
    script(R1, "--data", folders, "--epochs", 2, "--device", "cuda")
    run = tmp_path / "checkpoints/cifar10_r1"
    picture, flags = folders / "test/cat/0000.png", ["--checkpoint", run / "last.pt"]
    for device in ("cuda", "cpu"):
        assert f"{picture}: " in script("predict.py", picture, *flags, "--device", device).stdout
    (run / "confusion.png").unlink()
    script("plot.py", run, "--data", folders, "--device", "cuda")
    assert (run / "confusion.png").exists()


def test_statistics_of_images_on_the_gpu():
    images = torch.rand(8, 3, 32, 32)
    for dataset in (images, (255 * images).byte()):
        torch.testing.assert_close(get_mean_and_std(dataset.cuda()), get_mean_and_std(dataset))


@pytest.mark.long
@pytest.mark.parametrize("name, flags", [("profile", []), ("throughput", ["--rounds", "1"])])
def test_the_benchmarks(name, flags):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--only", "batch-size", "--data", "synthetic", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0 and torch.cuda.get_device_name() in done.stdout, done.stderr
