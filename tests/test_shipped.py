"""The networks in checkpoints/: they are what their records say, one command stores them, and they can be exported."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CIFAR10_CLASSES, R1, R5, ROOT, hide, write_images
from PIL import Image

import harness.shipped
import models
import predict
from harness.data import load_data
from harness.results import RESULTS, read_record
from harness.shipped import FOLDER
from harness.terminal import UserError

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.pt"))
EXPORTED = [".pt2", pytest.param(".onnx", marks=pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="pip install onnx onnxscript onnxruntime for the tests of predict.py --export model.onnx"
))]  # fmt: skip


def test_they_are_small():
    assert predict.DEFAULT in SHIPPED
    assert sum(path.stat().st_size for path in FOLDER.glob("*.pt")) < 10e6


@pytest.mark.parametrize("name", SHIPPED)
def test_each_network_is_of_its_record(name):
    network = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    record = read_record(RESULTS / network["record"])
    assert network["accuracy"] == record["accuracy"] and network["commit"] == record["commit"]
    assert network["epoch"] == record["epochs"][-1]["epoch"] and network["classes"] == [*record["per_class"]]
    assert {tensor.dtype for tensor in network["weights"].values() if tensor.dim() > 1} == {torch.float16}


def test_a_package_that_is_not_installed(refused):
    line = refused("predict.py", "--export", "x.onnx", before=hide("onnxscript"))
    assert "--export to .onnx needs two more packages: pip install onnx onnxscript" in line


@pytest.mark.long
@pytest.mark.parametrize("name", SHIPPED)
def test_each_network_has_its_accuracy(name, cifar10_data):
    classifier, data = predict.load_classifier(name), cifar10_data
    batches = zip(data.test_images.split(25), data.test_labels.split(25), strict=True)  # faster on one core than 100
    right = sum((classifier(images).argmax(1) == labels).sum().item() for images, labels in batches)
    assert 100 * right / len(data.test_labels) == pytest.approx(classifier.accuracy, abs=0.05)


def test_a_script_evaluates_a_shipped_network(script, tmp_path):
    data = write_images(tmp_path / "pictures", classes=CIFAR10_CLASSES, train=1, test=2)
    classifier, data_in_memory = predict.load_classifier("r5"), load_data(str(data))
    right = (classifier(data_in_memory.test_images).argmax(1) == data_in_memory.test_labels).sum().item()
    flags = ["--data", data, "--precision", "fp32", "--evaluate", FOLDER / "r5.pt"]
    out = script(R5, *flags).stdout
    assert f"Accuracy of the network on the test images: {5 * right:.1f} %\n" in out and "Accuracy of plane: " in out


def in_this_folder():
    """Make the script ship into this folder, from records in it."""
    harness.shipped.FOLDER, harness.shipped.RESULTS = Path(), Path("results").resolve()


def test_a_run_is_shipped(script, refused, tmp_path, folders, monkeypatch):
    flags = ["--ship", "small", "--only", "r1"]
    assert "is not the folder of a finished run" in refused("reproduce.py", *flags, before=in_this_folder)
    run = tmp_path / "checkpoints/reproduce/cifar10_r1"
    script(R1, "--data", folders, "--epochs", 2, "--checkpoints", run.parent)
    (tmp_path / "results/cpu").mkdir(parents=True)
    expected = "copy it into one of its folders as r1-seed0.json"
    assert expected in refused("reproduce.py", *flags, before=in_this_folder)
    record = tmp_path / "results/cpu/r1-seed0.json"
    record.write_text((run / "run.json").read_text().replace('"seconds"', '"minutes"'))  # of another run
    assert expected in refused("reproduce.py", *flags, before=in_this_folder)
    assert "name it with --only" in refused("reproduce.py", *flags, "r2", before=in_this_folder)
    assert "name it with --seed" in refused("reproduce.py", *flags, "--seeds", 2, before=in_this_folder)
    assert not (tmp_path / "small.pt").exists()
    (tmp_path / "results/mine").mkdir()
    shutil.copy(run / "run.json", tmp_path / "results/mine/r1-seed0.json")  # which Git ignores
    assert expected in refused("reproduce.py", *flags, before=in_this_folder)
    shutil.copy(run / "run.json", record)
    (run / "mistakes.png").rename(run / "away.png")
    assert "mistakes.png is missing; " in refused("reproduce.py", *flags, before=in_this_folder)
    assert not (tmp_path / "small.pt").exists()
    (run / "away.png").rename(run / "mistakes.png")
    assert "the network is in small.pt; " in script("reproduce.py", *flags, before=in_this_folder).stdout

    small, last = (predict.load_classifier(path) for path in (tmp_path / "small.pt", run / "last.pt"))
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(small(images), last(images), atol=0.02, rtol=0)
    assert small.accuracy == json.loads(record.read_text())["accuracy"] and small.epoch == 2
    assert (tmp_path / "small.pt").stat().st_size < 0.6 * (run / "best.pt").stat().st_size
    assert (tmp_path / "small-mistakes.png").read_bytes() == (run / "mistakes.png").read_bytes()
    network = torch.load(tmp_path / "small.pt", weights_only=True)
    assert network["record"] == "cpu/r1-seed0.json"
    assert {tensor.dtype for tensor in network["weights"].values() if tensor.dim() == 1} == {torch.float32}

    monkeypatch.setattr(harness.shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(harness.shipped, "RESULTS", tmp_path / "results")
    shutil.copy(run / "best.pt", tmp_path / "own.pt")  # a user's, without a record
    table, by_class = harness.shipped.shipped_tables()
    assert "| `small` |" in table and "| `small` |" in by_class and "own" not in table + by_class
    record.write_text("<<<<<<< HEAD")
    read_record.cache_clear()
    with pytest.raises(UserError, match="cannot be read; restore it"):
        harness.shipped.shipped_tables()


def write_network(path, name):
    """Write a checkpoint of a network whose batch-norm has statistics, and whose logits have a std of about 1."""
    torch.manual_seed(2)  # with 0, WhitenedCNN gives one class less than 0.2 % of every image
    model = getattr(models, name)(num_classes=3)
    images = torch.randn(20, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics become these images'
    with torch.no_grad():
        model(images)
        last = [parameter for parameter in model.parameters() if parameter.dim() == 2][-1]
        last.div_(model.eval()(images).std())
    network = {"model": name, "arguments": model.arguments, "weights": model.state_dict(), "epoch": 1}
    network |= {"classes": ["cat", "dog", "frog"], "data": "class folders", "accuracy": 50.0}
    torch.save(network | {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}, path)


def run_exported(path, images):
    """Return the probabilities of an exported network, and its classes."""
    if path.suffix == ".pt2":
        extra = {"classes": ""}
        return torch.export.load(path, extra_files=extra).module()(images), json.loads(extra["classes"])
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (probabilities,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(probabilities), json.loads(session.get_modelmeta().custom_metadata_map["classes"])


@pytest.mark.parametrize("suffix", EXPORTED)
@pytest.mark.parametrize("name", [name for name in models.__all__ if name != "SixViews"])
def test_an_exported_network_says_the_same(tmp_path, name, suffix):
    write_network(tmp_path / "best.pt", name)
    classifier, path = predict.load_classifier(tmp_path / "best.pt"), tmp_path / f"model{suffix}"
    predict.export(classifier, path)
    images = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8)
    expected = classifier(images).softmax(1)
    assert expected.std(0).min() > 1e-3  # the images are told apart
    for n in (100, 1):
        probabilities, classes = run_exported(path, images[:n])
        torch.testing.assert_close(probabilities, expected[:n], atol=1e-4, rtol=0)
        assert probabilities.dtype == torch.float32 and classes == ["cat", "dog", "frog"]
    if suffix == ".pt2":
        operations = {str(node.target) for node in torch.export.load(path).graph.nodes}
        assert not {name for name in operations if "index_select" in name}  # of a layer's own way on a CPU


@pytest.mark.parametrize("suffix", EXPORTED)
def test_export_as_the_page_says(script, tmp_path, monkeypatch, capsys, suffix):
    """The page's code, run without this repository, gives what predict.py gives."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)).save(tmp_path / "cat.jpg")
    done = script("predict.py", "--export", f"model{suffix}")
    assert done.stdout.startswith(f"model{suffix} takes images, uint8 of shape (N, 3, 32, 32), ") and not done.stderr
    page = (ROOT / "docs/export.md").read_text()
    picture, *snippets = re.findall(r"(?:^    .*\n)*^    (?:import|from) .*\n(?:^    .*\n)*", page, re.MULTILINE)
    (snippet,) = [code for code in snippets if f"model{suffix}" in code]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line[4:] for line in (picture + snippet).splitlines()), {})
    answer = json.loads(script("predict.py", "cat.jpg", "--json").stdout)
    assert capsys.readouterr().out.strip() == next(iter(answer["predictions"][0]["probabilities"]))
