"""The benchmarks as a user runs them. The measured values themselves are not tested."""

import subprocess
import sys

import utils

import pytest
import torch
from helpers import R5, ROOT

from benchmarks.scripts import IMAGES, prepare
from benchmarks.throughput import ALTERNATIVES, GIVE_BACK
from harness.data import load_data
from models import WhitenedCNN
from models.cpu_layers import Conv3x3

pytestmark = pytest.mark.long


def benchmark(name, *flags):
    """Return the output of `python -m benchmarks.NAME` with these flags on the synthetic images."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags, "--data", "synthetic", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_candidate_is_measured():
    first, _, head, _, *rows = benchmark("throughput", "--only", "batch-size", "--rounds", "1").splitlines()
    assert first.endswith("medians of 1 rounds.") and "synthetic" in first
    names, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows))
    training, testing = (dict(zip(names, row, strict=True)) for row in rows)
    assert training["script"] == "`cifar10_r1.py --flip --batch-size 4`" == testing["script"].partition(",")[0]
    assert (training["batch"], testing["batch"]) == ("4", "500") and training["precision"] == "fp32"
    for row in (training, testing):
        assert row["ours in fp32"] == row["MB, ours in fp32"] == ""  # because ours is in fp32 already
        baseline, ours, limit = (float(row[name].replace(",", "")) for name in ("baseline", "ours", "limit"))
        assert float(row["ours/baseline"]) == pytest.approx(ours / baseline, rel=0.05)
        assert float(row["ours/limit"]) == pytest.approx(ours / limit, rel=0.05)
        assert all(float(row[f"MB, {name}"].replace(",", "")) > 0 for name in ("baseline", "ours", "limit"))
    assert 0 < float(training["share"]) < 1 and testing["share"] == ""


def test_alternatives_are_compared_with_the_limit():
    first, _, head, _, row = benchmark(
        "throughput", "--alternatives", "--only", "batch-size", "--rounds", "1"
    ).splitlines()
    assert "as a fraction of the limit" in first
    names, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, row))
    measured = {name for name, cell in zip(names, cells, strict=True) if cell}
    assert measured == {"script", "limit", "torch.compile", GIVE_BACK}  # r1 has no layer with a way of its own
    assert 0 < float(cells[names.index("torch.compile")]) < 10


@pytest.mark.parametrize("name, alternative", ALTERNATIVES.items())
def test_an_alternative_is_of_a_script(name, alternative):
    assert all(any(word in command for command in IMAGES) for word in alternative.words)


def test_plain_convolutions_compute_the_same(monkeypatch):
    monkeypatch.setattr(Conv3x3, "forward", Conv3x3.forward)  # put back what the alternative replaces
    model = WhitenedCNN(mirrored=True).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # the halves of the kernels are each other's mirror images no more
    images = torch.randn(2, 3, 32, 32)
    logits = model(images)
    ALTERNATIVES["plain 3x3 convolutions"].change(None)
    torch.testing.assert_close(model(images), logits)


def test_a_script_is_measured_as_it_trains(monkeypatch):
    for name in ("load_data", "train", "test"):
        monkeypatch.setattr(utils, name, getattr(utils, name))  # put back what `prepare` replaces
    monkeypatch.setattr(sys, "argv", sys.argv)
    data = load_data("synthetic")
    script = prepare(f"{R5} --tta --batch-size 500", data, torch.device("cpu"), "fp32")
    loader, optimizer = script.train_loader, script.train_step.optimizer
    assert len(loader.labels) == len(data.train_labels) and set(loader.batch_sizes) == {500}
    assert (loader.training, loader.flip, loader.crop, loader.reflect) == (True, "alternating", 2, True)
    assert isinstance(optimizer, utils.Muon) and script.train_step.scheduler and loader.dtype == torch.float32
    assert script.criterion.label_smoothing == 0.1 and isinstance(script.model, WhitenedCNN)
    assert not script.test_loader.training and len(script.test_loader.labels) == len(data.test_labels)


def test_the_profile_names_what_takes_the_time():
    assert "convolution" in benchmark("profile", "--only", "r1.py")


@pytest.mark.parametrize("name", ["throughput", "profile"])
def test_a_word_that_is_in_no_command_is_an_error(name):
    for word in ("r9", "cifar10"):  # a word in every command chooses nothing
        command = [sys.executable, "-m", f"benchmarks.{name}", "--only", word]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and f"--only {word} is in none of cifar10_r1.py" in done.stderr
