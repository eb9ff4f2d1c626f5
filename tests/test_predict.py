"""predict.py: the predictions of a trained network, on the command line and as a function."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import R1, R3, ROOT, SCRIPTS, Trap, png, write_images
from PIL import Image

import predict
from harness.data import list_images
from models import TutorialCNN


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the best.pt of a run that tells the three classes apart by their brightness."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--data", write_images(folder / "pictures"), "--epochs", 20, "--lr", 0.02]
    subprocess.run([sys.executable, ROOT / R1, *map(str, flags)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "checkpoints/cifar10_r1/best.pt"


def test_pictures_and_folders(script, tmp_path, trained):
    dark, light = tmp_path / "dark.jpg", tmp_path / "light ü.png"
    Image.new("L", (300, 200), 40).save(dark)  # of any size and kind
    Image.new("RGBA", (20, 50), (160, 160, 160, 255)).save(light)
    write_images(tmp_path / "more", train=2, test=1)
    (tmp_path / "more/train/link").symlink_to(tmp_path / "more/test")  # is not followed
    out = script("predict.py", dark, light, tmp_path / "more/train", "--checkpoint", trained).stdout.splitlines()
    assert out[0].startswith(f"{trained}: TutorialCNN, epoch ")
    assert out[0].endswith(" % of the test images right; trained on cat, dog, frog")
    assert out[1].startswith(f"{dark}: cat ") and out[2].startswith(f"{light}: frog ")
    assert [line.split(": ")[1].split()[0] for line in out[3:]] == ["cat"] * 2 + ["dog"] * 2 + ["frog"] * 2

    answer = json.loads(script("predict.py", dark, light, "--checkpoint", trained, "--json").stdout)
    assert [prediction["file"] for prediction in answer["predictions"]] == [str(dark), str(light)]
    for prediction, line in zip(answer["predictions"], out[1:], strict=False):
        shown = ", ".join(f"{name} {100 * p:.1f} %" for name, p in prediction["probabilities"].items())
        assert line == f"{prediction['file']}: {shown}"
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
    best = torch.load(trained, weights_only=True)
    assert (answer["test_accuracy"], answer["epoch"]) == (best["accuracy"], best["epoch"])


def test_three_classes_are_shown_and_synthetic_images_are_said(script, tmp_path):
    network, classes = TutorialCNN(4), ["bars", "columns", "cr\noss", "diamond"]
    checkpoint = {"model": "TutorialCNN", "arguments": network.arguments, "weights": network.state_dict(), "epoch": 1}
    checkpoint |= {"classes": classes, "data": "synthetic", "accuracy": 50.0, "mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save(checkpoint, tmp_path / "best.pt")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    first, second = script("predict.py", "a.png", "--checkpoint", "best.pt").stdout.splitlines()
    assert first.endswith("; trained on bars, columns, cr\\noss, diamond (synthetic images)")
    assert second.count("%") == 3


def test_a_bad_picture_costs_no_other(script, tmp_path, trained):
    write_images(tmp_path / "more", train=2, test=1)
    folder = tmp_path / "more/train"
    (folder / "cat/0000.png").write_text("no picture")
    (folder / "frog/0001.png").write_text("no picture")
    for flags in ([], ["--json"], ["--plot", "all.png"]):
        done = script("predict.py", folder, "--checkpoint", trained, *flags, status=2)
        shown = [place for place in ("cat/0001", "dog/0000", "dog/0001", "frog/0000") if f"{place}.png" in done.stdout]
        assert len(shown) == 4 and done.stdout.count(".png") == 4 + (flags == ["--plot", "all.png"])
        lines = [line for line in done.stderr.splitlines() if line.startswith("predict.py: error: ")]
        assert ["cat/0000.png" in lines[0], "frog/0001.png" in lines[1]] == [True, True] and len(lines) == 2


def test_pictures_are_drawn(script, tmp_path, trained):
    Image.new("RGB", (300, 200), (40, 160, 40)).save(tmp_path / "green.jpg")
    pictures = ["green.jpg"] * 7
    out = script("predict.py", *pictures, "--checkpoint", trained, "--plot", "all.png").stdout
    assert out.endswith("the pictures are in all.png\n")
    drawn = np.asarray(Image.open(tmp_path / "all.png").convert("RGB")).astype(int)
    green = (abs(drawn - (40, 160, 40)).max(2) < 12).mean()
    assert 0.2 < green < 0.6 and drawn.shape[1] > drawn.shape[0]  # seven pictures in two rows of five
    last = drawn[drawn.shape[0] // 2 :]
    assert (abs(last - (40, 160, 40)).max(2) < 12).any() and (last[:, last.shape[1] // 2 :] == 255).mean() > 0.95
    out = script("predict.py", *pictures * 6, "--checkpoint", trained, "--plot", "some.png").stdout
    assert out.count("green.jpg: ") == 42 and out.endswith("the first 40 of 42 pictures are in some.png\n")


def test_more_pictures_than_a_batch(script, tmp_path, trained):
    count = predict.BATCH_SIZE + 5
    for number in range(count):
        Image.new("L", (32, 32), 40 if number % 2 else 160).save(tmp_path / f"{number:03}.png")
    out = script("predict.py", *sorted(tmp_path.glob("*.png")), "--checkpoint", trained).stdout.splitlines()[1:]
    assert [line.split(": ")[1].split()[0] for line in out] == [("frog", "cat")[i % 2] for i in range(count)]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != R3])
@pytest.mark.long
def test_the_function_gives_the_accuracy_that_the_run_had(script, tmp_path, folders, name):
    """Every network has the accuracy that its file says, on images read from their files as a user would."""
    script(name, "--data", folders, "--epochs", 2, "--precision", "fp32")
    (run,) = (tmp_path / "checkpoints").iterdir()
    classifier = predict.load_classifier(run / "best.pt")
    files = list_images(folders / "test")
    images = torch.stack([predict.read_picture(path) for paths in files.values() for path in paths])
    labels = torch.arange(3).repeat_interleave(10)
    accuracy = (classifier(images).argmax(1) == labels).double().mean().item() * 100
    assert accuracy == pytest.approx(classifier.accuracy) and classifier.classes == ["cat", "dog", "frog"]
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_a_picture_of_32x32_is_left_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels.repeat(5, 0).repeat(3, 1)).save(tmp_path / "large.png")
    for name in ("a.png", "large.png"):
        assert np.array_equal(predict.read_picture(tmp_path / name).permute(1, 2, 0), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    picture.paste((40, 40, 40, 255), (0, 0, 32, 16))
    picture.convert(mode).save(tmp_path / "cut_out.png")
    pixels = predict.read_picture(tmp_path / "cut_out.png")
    assert (pixels[:, :16] == 40).all() and (pixels[:, 16:] == 255).all()


def test_a_photo_is_turned_the_right_way_up(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture.save(tmp_path / "photo.png", exif=exif)
    upright = np.asarray(picture.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(predict.read_picture(tmp_path / "photo.png").permute(1, 2, 0), upright)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "name pictures to classify, or a file to --export the network to"),
        ("good.png --export model.pt2", "name pictures to classify, or a file to --export the network to"),
        ("--export model.pth", "'model.pth' is not a name for --export; end it in .onnx or .pt2"),
        ("--export none/model.pt2", "none/model.pt2 cannot be written: No such file or directory"),
        (
            "good.png --checkpoint none.pt",
            "no none.pt; train that run first, or use one of the networks in checkpoints/: ",
        ),
        ("good.png --checkpoint text.pt", "text.pt is damaged or not a checkpoint"),
        (
            "good.png --checkpoint hostile.pt",
            "hostile.pt holds more than weights and plain values, maybe code: do not",
        ),
        ("good.png --checkpoint unknown.pt", "unknown.pt holds a network 'utils'; models/ has MobileNetV2, ResNet18,"),
        ("good.png --checkpoint changed.pt", "changed.pt holds a different TutorialCNN from the one in models/ now"),
        ("good.png --checkpoint best.pt --device cuda:99", "--device cuda:99: this machine"),
        ("none.png --checkpoint best.pt", "none.png does not exist; name a picture or a folder of them"),
        ("text.png --checkpoint best.pt", "text.png is not a readable image"),
        ("cut.png --checkpoint best.pt", "cut.png is not a readable image"),
        ("bomb.png --checkpoint best.pt", "bomb.png is not a readable image"),
        ("bomb.png --checkpoint best.pt", "pixels, could be decompression bomb DOS attack.); scale it down"),
        ("good.png empty --checkpoint best.pt", "empty holds no image"),
        ("good.png --checkpoint best.pt --plot out.xyz", "'out.xyz' has no picture suffix"),
    ],
)
def test_mistakes_are_refused(refused, tmp_path, flags, words):
    checkpoint = {
        "model": "TutorialCNN", "arguments": {"num_classes": 3}, "weights": TutorialCNN(3).state_dict(), "epoch": 1,
        "classes": ["cat", "dog", "frog"], "data": "class folders", "accuracy": 50.0,
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "best.pt")
    torch.save(checkpoint | {"model": "utils"}, tmp_path / "unknown.pt")
    torch.save(checkpoint | {"arguments": {"num_classes": 4}}, tmp_path / "changed.pt")
    torch.save(checkpoint | {"weights": Trap(tmp_path / "sprung")}, tmp_path / "hostile.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    if "bomb" in flags:
        (tmp_path / "bomb.png").write_bytes(png(0, 1, bits=8, side=20_000))
    (tmp_path / "empty").mkdir()
    assert words in refused("predict.py", *flags.split())
    assert not (tmp_path / "sprung").exists()


def test_loading_draws_no_random_number(script, tmp_path, folders):
    script(R1, "--data", folders, "--epochs", 1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    predict.load_classifier(tmp_path / "checkpoints/cifar10_r1/best.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_classifier_normalises_as_its_run_did():
    network, mean, std = TutorialCNN(3), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    checkpoint = {"model": "TutorialCNN", "classes": ["a", "b", "c"], "data": "", "epoch": 1, "accuracy": 50.0}
    checkpoint |= {"mean": mean, "std": std}
    images = torch.arange(2 * 3 * 32 * 32).remainder(256).to(torch.uint8).view(2, 3, 32, 32)
    normalised = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(predict.Classifier(network, checkpoint)(images), network(normalised.float()))
