"""plot.py: the pictures of runs."""

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import R1, ROOT, write_images
from PIL import Image

import plot
from harness import drawing
from harness.results import RESULTS

PICTURES = ("curves.png", "confusion.png", "mistakes.png")


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_command_draws_what_the_script_drew(script, tmp_path, folders):
    run = tmp_path / "checkpoints/cifar10_r1"
    out = script(R1, "--data", folders, "--epochs", 2).stdout
    assert f"curves.png, confusion.png and mistakes.png are in {run.relative_to(tmp_path)}" in out
    drawn = {name: pixels(run / name) for name in PICTURES}
    for name, picture in drawn.items():
        assert picture.std() > 10, name  # not one colour
        (run / name).unlink()
    script("plot.py", run, "--data", folders)
    for name in PICTURES:
        assert np.array_equal(pixels(run / name), drawn[name]), name


def write_logs(*folders):
    for folder in folders:
        folder.mkdir(parents=True)
        columns = "epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy,seconds"
        (folder / "log.csv").write_text(f"{columns}\n1,0.1,2,30,2,35,9\n2,0.1,1,50,1,55,9\n")


def test_several_runs_in_one_picture(script, tmp_path):
    runs = tmp_path / "checkpoints/cifar10_r1", tmp_path / "checkpoints/cifar10_r1-flip"
    write_logs(*runs)
    script("plot.py", *runs)
    assert pixels(tmp_path / "comparison.png").std() > 10
    script("plot.py", *runs, "--output", "both.SVG")
    assert all(f"<!-- {run.name} -->" in (tmp_path / "both.SVG").read_text() for run in runs)


def test_the_confusion_matrix_and_the_mistakes(tmp_path, monkeypatch):
    """Numbers, texts and images are right and where they belong, for a matrix and logits with known answers."""
    drawn = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.append(figure))
    drawing.confusion(torch.tensor([[8, 2, 0], [0, 5, 0], [1, 0, 3]]), ["cat", "dog", "frog"], "network", tmp_path)
    (axis,) = drawn[0].axes
    places = {text.get_text(): text.get_position() for text in axis.texts}
    assert places == {"80.0": (0, 0), "20.0": (1, 0), "100.0": (1, 1), "25.0": (0, 2), "75.0": (2, 2)}
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted as", "true class")

    labels = torch.tensor([0, 0, 1, 2])
    logits = torch.tensor([[9.0, 0, 0], [0, 2, 0], [0, 0, 5], [0, 0, 1]])  # the second and the third are wrong
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    drawing.mistakes(images, labels, logits, ["cat", "dog", "frog"], "network", tmp_path)
    texts = all_texts(drawn[1])
    assert [text for text in texts if "\nis " in text] == ["frog 98.7 %\nis dog", "dog 78.7 %\nis cat"]
    assert [axis.images[0].get_array().max() for axis in drawn[1].axes if axis.images] == [2, 1]
    assert any("2 of 4 images wrong" in text for text in texts)


def test_the_solid_curve_is_of_the_test_images(monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.append(figure))
    row = {"lr": 0.1, "train_loss": 1, "train_accuracy": 50, "test_loss": 2, "test_accuracy": 60}
    drawing.curves({"r1": [row | {"epoch": epoch} for epoch in (1, 2)]}, "curves")
    found = [{line.get_linestyle(): [*line.get_ydata()] for line in axis.lines} for axis in drawn[0].axes]
    assert found == [{"-": [60, 60], ":": [50, 50]}, {"-": [2, 2], ":": [1, 1]}, {"-": [0.1, 0.1]}]


def all_texts(figure):
    texts = [figure.get_suptitle()]
    for axis in figure.axes:
        texts += [axis.get_title(), *(text.get_text() for text in axis.texts)]
    return texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a run on the images of `folders`."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, ROOT / R1, "--data", write_images(folder / "pictures"), "--epochs", "1"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "checkpoints/cifar10_r1"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("nowhere", "no nowhere/log.csv; name the folder of a run"),
        ("nowhere {run}", "no nowhere/log.csv"),
        ("{run} --data {other}", "was trained on other data than --data"),
        ("{run}", "was trained on class folders; name them with --data"),
        ("{run} --data empty", "was trained on class folders; name them with --data"),
        ("{run} --output x.png", "--output is for several runs"),
        ("{run} {run} --output x.txt", "argument --output: 'x.txt' has no picture suffix"),
        ("{run} {run} --output missing/x.png", "missing/x.png cannot be written"),
        (" ".join(["{run}"] * 13), "13 runs are too many, there are 12 colours"),
        ("bad", "bad/log.csv is not the log of a run"),
        ("huge", "huge/log.csv is not the log of a run"),
        ("{run} {run} --output C.PNG.txt", "argument --output: 'C.PNG.txt' has no picture suffix"),
        ("{run} {run} --output x.pgf", "x.pgf cannot be drawn ("),
        ("{run}/best --data {data}", "best/last.pt is for inference and does not name its data"),
        ("{run}/best/log", "best/log/last.pt is missing; the pictures of a run need its last network"),
        ("", "the following arguments are required: RUN"),
    ],
)
def test_mistakes_are_refused(refused, tmp_path, trained, folders, flags, words):
    shutil.copytree(trained, tmp_path / "checkpoints/cifar10_r1")
    other = write_images(tmp_path / "other", classes=("cat", "dog"), train=2, test=2) if "{other}" in flags else None
    if "x.pgf" in flags and shutil.which("xelatex"):
        pytest.skip("LaTeX is installed")
    if "/best" in flags:
        best = tmp_path / "checkpoints/cifar10_r1/best"
        best.mkdir()
        shutil.copy(best.parent / "best.pt", best / "last.pt")
        (best / "log").mkdir()  # and nothing else of the run
        for folder in (best, best / "log"):
            shutil.copy(best.parent / "log.csv", folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge/log.csv").write_text(f"epoch,lr\n1,{'9' * 200_000}\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/log.csv").write_text("epoch,lr\n1,one\n")
    assert words in refused("plot.py", *flags.format(run="checkpoints/cifar10_r1", other=other, data=folders).split())


def test_two_runs_of_the_same_name_are_two_curves(tmp_path, monkeypatch):
    write_logs(tmp_path / "one/cifar10_r1", tmp_path / "two/cifar10_r1")
    drawn = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "curves", lambda logs, path: drawn.update(logs))
    monkeypatch.setattr("sys.argv", ["plot.py", "one/cifar10_r1", "two/cifar10_r1"])
    plot.main()
    assert [*drawn] == ["one/cifar10_r1", "two/cifar10_r1"]


def test_each_seed_is_a_dot(script, refused, tmp_path):
    assert "no log.csv; name the folder of a run" in refused("plot.py", ".")
    record = json.loads((RESULTS / "cpu/r1-seed0.json").read_text())
    (tmp_path / "mine").mkdir()
    for row, values in (("r1", (60, 61, 63)), ("r1-flip", (67,))):
        for seed, accuracy in enumerate(values):
            (tmp_path / f"mine/{row}-seed{seed}.json").write_text(json.dumps(record | {"accuracy": accuracy}))
    (tmp_path / "mine/r1-seed3.json").write_text("<<<<")
    out = script("plot.py", "mine").stdout
    assert "mine/r1-seed3.json is not a record of a run; skipped\n" in out and "drawn in mine/seeds.png" in out
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "save", lambda figure, path: drawn.update({path: figure}))
        patch.setattr(sys, "argv", ["plot.py", str(tmp_path / "mine")])
        plot.main()
    (axis,) = drawn[tmp_path / "mine/seeds.png"].axes
    dots = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert [sorted(values) for values in dots] == [[60, 61, 63], [67]]  # by mean
    assert [text.get_text() for text in axis.texts] == ["61.33, n = 3", "67.00, n = 1"]
    (tmp_path / "mine/r1-seed2.json").write_text(json.dumps(record | {"epochs": record["epochs"][:1]}))
    assert "have no common mean: one has --epochs 1, this one has 26" in refused("plot.py", "mine")


def test_costs_add_up(monkeypatch):
    drawn = {}
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.update({path: figure}))
    logs = {
        "r1": [{"test_accuracy": a, "seconds": s} for a, s in ((60, 60), (61, 60), (65, 240))],
        "r2": [{"test_accuracy": 80, "seconds": 600}],
    }
    drawing.costs(logs, {"r1": 0.75, "r2": 2}, "costs")
    minutes, operations = drawn["costs"].axes
    curves = [
        [[*line.get_xdata()] for line in axis.lines if line.get_marker() != "o"] for axis in (minutes, operations)
    ]
    assert curves == [[[1, 2, 3], [10]], [[0.25, 0.5, 0.75], [2]]]  # one epoch was disturbed
    for axis in (minutes, operations):
        assert [text.get_text() for text in axis.texts] == ["r1 65.0", "r2 80.0"]


def test_no_label_of_the_costs_lies_on_another_or_on_a_dot(monkeypatch):
    drawn = {}
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.update({path: figure}))
    logs = {
        name: [{"test_accuracy": accuracy, "seconds": 60}] for name, accuracy in (("a", 90), ("b", 90.1), ("c", 91))
    }
    drawing.costs(logs, dict.fromkeys(logs, 1), "costs")
    for axis in drawn["costs"].axes:
        boxes = [text.get_window_extent() for text in axis.texts]
        dots = [axis.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1])) for line in axis.lines]
        assert [text.get_text() for text in axis.texts] == ["a 90.0", "b 90.1", "c 91.0"]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert not any(box.contains(*dot) for box in boxes for dot in dots)
        assert all(abs(box.y0 - dot[1]) < 60 for box, dot in zip(boxes, dots[1::2], strict=True))  # near its own


def test_an_import_leaves_matplotlibs_settings_alone():
    code = "import matplotlib; before = dict(matplotlib.rcParams); import mean_and_std, plot, predict, reproduce; "
    code += "assert before == dict(matplotlib.rcParams)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
