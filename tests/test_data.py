"""The datasets that `--data` takes, and the batches that the loader makes of them."""

import errno
import itertools
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from helpers import CIFAR10_CLASSES, Trap, png, write_images
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

import harness.data
from harness.data import Data, load_data, read_original
from harness.loader import GROUP, Loader
from harness.terminal import UserError

# ------------------------------------------------------------------------------------------- class folders


def test_class_folders(folders):
    data = load_data(folders)
    assert data.classes == ["cat", "dog", "frog"] and data.source == "class folders"
    assert data.train_images.shape == (90, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [0] * 30 + [1] * 30 + [2] * 30
    assert data.test_images.shape == (30, 3, 32, 32) and data.test_labels.dtype == torch.int64
    pixels = np.asarray(Image.open(folders / "test/dog/0003.png"))
    assert (data.test_images[13].permute(1, 2, 0).numpy() == pixels).all()


@pytest.mark.parametrize("suffix", [".bmp", ".webp", ".tiff", ".ppm", ".PNG", ".gif"])
def test_any_format_of_pillow(tmp_path, suffix):
    assert len(load_data(write_images(tmp_path, suffix=suffix)).train_labels) == 90


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA", "CMYK"])
def test_other_modes_become_rgb(folders, mode):
    image = Image.open(folders / "train/cat/0000.png").convert(mode)
    suffix = ".tiff" if mode == "CMYK" else ".png"
    (folders / "train/cat/0000.png").unlink()
    image.save(folders / f"train/cat/0000{suffix}")
    first = load_data(folders).train_images[0]
    assert (first.permute(1, 2, 0).numpy() == np.asarray(image.convert("RGB"))).all()


def test_a_bitmap_in_text(folders):
    (folders / "train/cat/0000.png").write_text("P1 32 32 " + "1 0 " * 512)
    first = load_data(folders).train_images[0]
    assert not first[:, :, ::2].any() and (first[:, :, 1::2] == 255).all()


def test_other_files_are_left_alone(folders):
    for name in ("notes.txt", "train/labels.csv", "train/cat/notes.txt", "train/cat/.0001.png"):
        (folders / name).write_text("no image")
    assert len(load_data(folders).train_labels) == 90


def test_class_names_of_any_kind(tmp_path, script):
    write_images(tmp_path / "my pictures", classes=("été", "two words"))
    assert "Accuracy of two words: " in script("cifar10_r1.py", "--data", "my pictures", "--epochs", 1).stdout


def text_file(path):
    path.write_text("not an image")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def too_large(path):
    Image.new("RGB", (64, 32)).save(path)


def huge(path):
    path.write_bytes(png(0, 1, bits=8, side=20_000))


def sixteen_bits(path):
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(path)


@pytest.mark.parametrize("damage", [text_file, truncated, too_large, huge, sixteen_bits])
def test_a_bad_image_is_named(folders, damage):
    damage(folders / "test/dog/0007.png")
    with pytest.raises(UserError, match=r"test/dog/0007\.png (is|has) "):
        load_data(folders)


def test_a_folder_that_may_not_be_read_is_named(folders, monkeypatch):
    (folders / "train/cat/more").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "more":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # as the tests may be run by root
    with pytest.raises(PermissionError, match="train/cat/more"):
        load_data(folders)


def test_a_bad_name_stays_on_one_line(folders, refused):
    (folders / "train/cat/new\nline.png").write_text("not an image")
    assert r"new\nline.png" in refused("cifar10_r1.py", "--data", folders)


def test_bad_folders_are_named(tmp_path):
    def line():
        with pytest.raises(UserError) as error:
            load_data(tmp_path / "x")
        return str(error.value)

    write_images(tmp_path / "x", classes=("cat",))
    assert "x/train holds 1 class" in line()
    (tmp_path / "x/train/dog").mkdir()
    assert "x/train/dog holds no image" in line()
    Image.new("RGB", (32, 32)).save(tmp_path / "x/train/dog/0000.png")
    assert "x/train/dog has no counterpart in " in line()
    (tmp_path / "x/test").rename(tmp_path / "x/elsewhere")
    assert "x/test is missing" in line()


# --------------------------------------------------------------------------------------------- the original


def test_the_original(original):
    root, hashes, images = original
    data = read_original(root, **hashes)
    assert data.classes == CIFAR10_CLASSES
    assert len(data.train_labels) == 100 and len(data.test_labels) == 20
    assert data.train_images.is_contiguous(memory_format=torch.channels_last)
    assert data.train_labels[:20].tolist() == [i % 10 for i in range(20)]
    assert (data.train_images[25].flatten().numpy() == images["data_batch_2"][5]).all()
    assert (data.test_images[7].flatten().numpy() == images["test_batch"][7]).all()
    (root / CIFAR10.filename).unlink()  # the folder alone is enough
    again = read_original(root, **hashes)
    assert again.fingerprint() == data.fingerprint()
    assert [path.name for path in root.iterdir() if not path.name.startswith(".")] == [CIFAR10.base_folder]


def test_an_archive_with_another_hash_is_not_unpacked(original, refused):
    root, _, _ = original
    assert "SHA-256" in refused("cifar10_r1.py", "--data", root)
    assert not (root / CIFAR10.base_folder).exists()


def test_a_damaged_member_is_named_and_not_unpickled(original):
    root, hashes, _ = original
    read_original(root, **hashes)

    member = root / CIFAR10.base_folder / "data_batch_3"
    member.write_bytes(pickle.dumps(Trap(root / "sprung")))
    with pytest.raises(UserError, match="data_batch_3 is missing or damaged"):
        read_original(root, **hashes)
    assert not (root / "sprung").exists()


def test_an_interrupted_download_leaves_a_folder_that_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.data, "read_original", lambda root: root)
    for name in (f"{CIFAR10.filename}.part", f".{CIFAR10.filename}.lock"):
        (tmp_path / name).touch()
    assert load_data(str(tmp_path)) == tmp_path


def test_the_original_comes_before_class_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.data, "read_original", lambda root: root)
    for name in ("train", "test", CIFAR10.base_folder):
        (tmp_path / name).mkdir()
    assert load_data(str(tmp_path)) == load_data(str(tmp_path / CIFAR10.base_folder)) == tmp_path


# ------------------------------------------------------------------------------------------------ synthetic


def test_synthetic_is_the_same_for_everyone():
    data = load_data("synthetic")
    assert data.train_labels.bincount().tolist() == [1000] * 10
    assert data.test_labels.bincount().tolist() == [200] * 10
    assert data.fingerprint() == "e83bed3979cfbb03f0d663270a365b92296556534ed6f573109ee3a167690706"


# ------------------------------------------------------------------------------------------------ the loader


def make_loader(n=64, batch_size=8, **kwargs):
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    as_they_are = {"mean": (0, 0, 0), "std": (1 / 255,) * 3, "device": torch.device("cpu"), "dtype": torch.float32}
    return Loader(images, torch.arange(n), batch_size, **as_they_are | kwargs)


@pytest.mark.long
def test_flip_and_crop_have_torchvisions_distribution():
    """Every output of an image is one of 81 windows, mirrored or not, and each is as frequent as it should be."""
    n = 162 * 200
    loader = make_loader(1, flip=True, crop=4)
    image = loader.images[0]
    loader.images, loader.labels = image.expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.int64)
    loader.positions, loader.batch_sizes = torch.arange(n), [n // 10] * 10
    padded = v2.functional.pad(image, [4, 4, 4, 4])
    windows = [padded[:, y : y + 32, x : x + 32] for y, x in itertools.product(range(9), range(9))]
    index = {output.numpy().tobytes(): i for i, output in enumerate([*windows, *(w.flip(-1) for w in windows)])}
    assert len(index) == 162

    torchvisions = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    for outputs in (
        (torchvisions(image) for _ in range(n)),
        itertools.chain.from_iterable(batch for batch, _ in loader),
    ):
        count = torch.zeros(162)
        for output in outputs:
            count[index[output.round().to(torch.uint8).numpy().tobytes()]] += 1
        chi_squared = ((count - n / 162) ** 2 / (n / 162)).sum()
        assert 161 - 4 * 18 < chi_squared < 161 + 4 * 18  # 161 degrees of freedom: 161 +- sqrt(2 * 161) = 18


def test_each_image_of_a_batch_has_draws_of_its_own():
    loader = make_loader(256, batch_size=256, flip=True, crop=4)
    loader.images[:] = loader.images[0].clone()
    images, _ = next(iter(loader))
    assert len({image.numpy().tobytes() for image in images}) > 100  # of 162


@pytest.mark.parametrize("flip", [True, False])
def test_flip_alone(flip):
    loader = make_loader(flip=flip)
    for images, labels in loader:
        for image, label in zip(images.round().to(torch.uint8), labels, strict=True):
            mirrored = torch.equal(image.flip(-1), loader.images[label])
            assert torch.equal(image, loader.images[label]) or (flip and mirrored)


def test_a_crop_has_black_or_mirrored_borders():
    for reflect, mode in ((False, "constant"), (True, "reflect")):
        loader = make_loader(256, batch_size=256, crop=2, reflect=reflect)
        loader.images[:] = loader.images[0].clone()
        padded = v2.functional.pad(loader.images[0], [2, 2, 2, 2], padding_mode=mode)
        windows = [padded[:, y : y + 32, x : x + 32] for y, x in itertools.product(range(5), range(5))]
        images, _ = next(iter(loader))
        seen = {image.round().to(torch.uint8).numpy().tobytes() for image in images}
        assert seen == {window.numpy().tobytes() for window in windows}


def test_an_augmentation_that_means_nothing_is_refused():
    with pytest.raises(UserError, match="use crop=4"):
        make_loader(crop=True)
    with pytest.raises(UserError, match="crop=32: use a number of pixels from 0 to 31"):
        make_loader(crop=32)
    with pytest.raises(UserError, match="flip='alternate': use True or 'alternating'"):
        make_loader(flip="alternate")


def test_alternating_flips_show_both_sides_in_two_epochs():
    loader = make_loader(training=True, flip="alternating")
    sides = []
    for epoch in (1, 2, 3):
        loader.set_epoch(epoch)
        mirrored = torch.zeros(64, dtype=torch.bool)
        for images, labels in loader:
            for image, label in zip(images.round().to(torch.uint8), labels, strict=True):
                mirrored[label] = torch.equal(image.flip(-1), loader.images[label])
                assert mirrored[label] or torch.equal(image, loader.images[label])
        sides.append(mirrored)
    assert torch.equal(sides[0], ~sides[1]) and torch.equal(sides[0], sides[2])
    assert 16 < sides[0].sum() < 48


def test_cutout_is_a_square_around_a_random_pixel():
    n = 4096
    loader = make_loader(n, batch_size=256, cutout=8)
    loader.images[:] = 255
    holes = torch.cat([images for images, _ in loader])[:, 0] == 0
    centres = set()
    for hole in holes:
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns) and len(rows) <= 8 and len(columns) <= 8
        centres.add((rows[0].item(), columns[0].item()))
    assert len(centres) > 500  # of 28 * 28
    rows = [hole.any(1).nonzero().flatten() for hole in holes]
    assert {(r[0].item(), r[-1].item()) for r in rows} >= {(0, 3), (0, 7), (24, 31), (27, 31)}  # centres 0, 4, 28, 31
    assert holes[:, 8:-8, 8:-8].float().mean() == pytest.approx(64 / 32**2, rel=0.1)  # a pixel's chance to be cut out


def test_jitter_adds_a_number_to_each_image_and_multiplies_it_by_another():
    loader = make_loader(4096, batch_size=256, mean=(0.5,) * 3, std=(0.5,) * 3, jitter=0.2)
    loader.images[:, :, :16], loader.images[:, :, 16:] = 51, 204  # -0.6 and 0.6, normalised
    images = torch.cat([images for images, _ in loader])
    dark, bright = images[:, 0, 0, 0], images[:, 0, -1, 0]
    expected = torch.stack([dark, bright], 1)[:, None, :, None].repeat_interleave(16, 2).expand_as(images)
    assert torch.equal(images, expected)
    contrast = (bright - dark) / 1.2
    brightness = (bright + dark) / 2 / contrast
    for drawn, middle in ((contrast, 1), (brightness, 0)):
        offset = drawn - middle
        assert offset.min() == pytest.approx(-0.2, abs=0.002) and offset.max() == pytest.approx(0.2, abs=0.002)
        assert offset.mean() == pytest.approx(0, abs=0.01) and offset.std() == pytest.approx(0.4 / 12**0.5, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([contrast, brightness]))[0, 1]) < 0.1


def test_normalisation_is_torchvisions():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    loader = make_loader(mean=mean, std=std)
    theirs = v2.functional.normalize(v2.functional.to_dtype(loader.images, torch.float32, scale=True), mean, std)
    ours = torch.cat([images for images, _ in loader])
    assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=1e-5)
    half = next(iter(make_loader(mean=mean, std=std, dtype=torch.bfloat16)))[0]
    assert torch.equal(half, ours[:8].bfloat16())


@pytest.mark.parametrize(
    "n, batch_size, sizes",
    [(50_000, 128, {127, 128}), (10, 3, {2, 3}), (7, 2, {2, 3}), (3, 2, {3}), (5, 100, {5}), (4, 1, {1})],
)
def test_batches_differ_by_one_image_at_most(n, batch_size, sizes):
    loader = make_loader(n, batch_size, training=True)
    labels = [labels for _, labels in loader]
    assert {len(batch) for batch in labels} == sizes
    assert torch.cat(labels).sort().values.equal(torch.arange(n))
    assert len(loader) == len(labels)


def test_an_image_keeps_its_label():
    loader = make_loader(200, batch_size=16, training=True)
    loader.images[:] = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1)
    for images, labels in loader:
        assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_an_epoch_depends_on_seed_and_epoch_alone():
    def epoch(seed, number):
        loader = make_loader(training=True, flip=True, crop=4, seed=seed)
        loader.set_epoch(number)
        return torch.cat([images for images, _ in loader])

    assert torch.equal(epoch(1, 5), epoch(1, 5))
    assert not torch.equal(epoch(1, 5), epoch(1, 6)) and not torch.equal(epoch(1, 5), epoch(2, 5))


def test_photographs_are_read_upright_and_hidden_folders_are_not(tmp_path):
    folder = write_images(tmp_path / "pictures", classes=("cat", "dog"), train=2, test=2)
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16] = 255  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(upright[::-1, ::-1]).save(folder / "train/cat/0000.png", exif=exif)
    # Upside down too, and with a text where the unit of the resolution belongs, which Pillow reads but cannot write.
    notes = struct.pack("<2sHIHHHIIHHI4sI", b"II", 42, 8, 2, 0x0112, 3, 1, 3, 0x0128, 2, 2, b"2", 0)
    Image.fromarray(upright[::-1, ::-1]).save(folder / "train/dog/0000.jpg", exif=b"Exif\0\0" + notes, quality=100)
    Image.fromarray(upright).save(folder / "train/dog/0001.png", exif=b"no EXIF")
    (folder / "train/cat/.ipynb_checkpoints").mkdir()
    Image.fromarray(upright).save(folder / "train/cat/.ipynb_checkpoints/copy.png")
    data = load_data(folder)
    assert len(data.train_images) == 5
    for number in (0, 2, 4):
        assert np.array_equal(data.train_images[number].permute(1, 2, 0), upright)


def test_a_transform_draws_anew_for_each_group():
    loader = make_loader(64, batch_size=16, training=True, transform=v2.RandomInvert(0.5))
    loader.images[:] = 255
    torch.manual_seed(0)
    black = torch.cat([images.flatten(1).max(1).values == images.min() for images, _ in loader])
    assert black.view(-1, GROUP).float().std(1).max() == 0  # one draw a group
    assert 0 < black.float().mean() < 1
    for unusable in (v2.ToDtype(torch.float32, scale=True), v2.CenterCrop(24)):
        with pytest.raises(UserError, match="leave out what changes type or size"):
            next(iter(make_loader(64, batch_size=16, transform=unusable)))
    same, plain = make_loader(64, batch_size=16, transform=torch.nn.Identity()), make_loader(64, batch_size=16)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(same, plain, strict=True))


def test_held_out_images_are_a_fixed_tenth_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 25 + [2] * 3)
    images = torch.arange(128, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    data = Data(images, labels, images[:0], labels[:0], ["a", "b", "c"], "class folders")
    held = data.hold_out()
    assert held.test_labels.bincount().tolist() == [10, 2, 1] and held.train_labels.bincount().tolist() == [90, 23, 2]
    numbers = [part[:, 0, 0, 0].tolist() for part in (held.train_images, held.test_images)]
    assert sorted(numbers[0] + numbers[1]) == list(range(128)) and labels[numbers[1]].equal(held.test_labels)
    assert held.tested_on == "held-out training" and held.fingerprint() == data.hold_out().fingerprint()


# ---------------------------------------------------------------------------------------------- real images


@pytest.mark.long
def test_cifar10_itself(cifar10_data):
    data = cifar10_data
    assert data.classes == CIFAR10_CLASSES
    assert data.train_labels.bincount().tolist() == [5000] * 10 and data.test_labels.bincount().tolist() == [1000] * 10
    mean = data.train_images.double().mean((0, 2, 3)) / 255
    held = data.hold_out()
    assert held.train_labels.bincount().tolist() == [4500] * 10 and held.test_labels.bincount().tolist() == [500] * 10
    assert torch.allclose(mean, torch.tensor([0.49139968, 0.48215841, 0.44653091], dtype=torch.double), atol=1e-8)
