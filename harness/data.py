"""Datasets in memory, from the original's files, class folders or the built-in images, and single image files."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import has_file_allowed_extension
from torchvision.datasets.utils import check_integrity

from harness.download import CIFAR10_MIRRORS, CIFAR10_SHA256, CIFAR10_SIZE, provide_folder
from harness.synthetic import make_synthetic
from harness.terminal import UserError, progress_bar

RECOGNISED_ONLY = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow opens but cannot read by itself


class Data(NamedTuple):
    """A dataset in memory. Images are uint8 of shape (N, 3, 32, 32), channels-last; labels int64 of shape (N,)."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list[str]  # in the order of the labels
    source: str  # "CIFAR-10 archive", "class folders" or "synthetic"
    tested_on: str = "test"  # where the test images come from: "held-out training" after `hold_out`

    def fingerprint(self) -> str:
        """Return the SHA-256 over every image, label and class name, in order: 64 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for tensor in self[:4]:
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    def hold_out(self) -> "Data":
        """Return the dataset with every tenth training image of each class as its test images: 5,000 for CIFAR-10.

        Recipes are chosen on these, so that the test images stay unseen. Raises UserError if a class has fewer than
        two images.
        """
        held_out = torch.zeros(len(self.train_labels), dtype=torch.bool)
        for label, name in enumerate(self.classes):
            indices = (self.train_labels == label).nonzero().flatten()
            if len(indices) < 2:
                raise UserError(f"--holdout: the class {name} has {len(indices)} training image; it needs two or more")
            last_of_ten = min(len(indices), 10) - 1  # a smaller class gives its last image
            held_out[indices[last_of_ten::10]] = True
        kept = ~held_out
        images, labels = self.train_images, self.train_labels
        return self._replace(
            train_images=images[kept],
            train_labels=labels[kept],
            test_images=images[held_out],
            test_labels=labels[held_out],
            tested_on="held-out training",
        )


def load_data(name: str) -> Data:
    """Load the dataset in the folder `name`, or the built-in images if `name` is "synthetic".

    CIFAR-10 is downloaded into a folder that is new or empty. Raises UserError if the download fails, if the folder
    holds other things, or if the dataset cannot be read.
    """
    if name == "synthetic":
        return Data(*make_synthetic(), "synthetic")
    root = Path(name)
    if root.is_file():
        raise UserError(f"--data {name} is a file; name the folder it is in")
    if root.name == CIFAR10.base_folder:
        root = root.parent
    original = (root / CIFAR10.base_folder).is_dir() or (root / CIFAR10.filename).is_file()
    if not original and ((root / "train").is_dir() or (root / "test").is_dir()):
        return read_class_folders(root)
    if not original:
        check_is_free(root)
    return read_original(root)


def check_is_free(root: Path) -> None:
    """Raise UserError if a folder that CIFAR-10 would be downloaded into holds something else."""
    others = [path.name for path in root.iterdir()] if root.is_dir() else []
    others = sorted(name for name in others if name[0] != "." and name != f"{CIFAR10.filename}.part")
    if others:
        raise UserError(
            f"{root} holds {', '.join(others[:3])}{', ...' * (len(others) > 3)}, but no {CIFAR10.filename}, no "
            f"{CIFAR10.base_folder} and no train/ and test/ with class folders; name a folder that holds one of these, "
            "or a new one to download CIFAR-10 into"
        )


def read_original(
    root: Path,
    mirrors: Sequence[str] = CIFAR10_MIRRORS,
    size: int = CIFAR10_SIZE,
    sha256: str = CIFAR10_SHA256,
    dataset: type[CIFAR10] = CIFAR10,
) -> Data:
    """Load CIFAR-10 as its authors publish it, `cifar-10-batches-py`. Download and unpack it first if necessary.

    The archive is unpacked only if its SHA-256 is `sha256`. A member is unpickled only if its MD5 is the one listed by
    `dataset`, torchvision's class. Raises UserError otherwise.
    """
    folder, archive = root / dataset.base_folder, root / dataset.filename
    if not folder.is_dir():
        provide_folder(folder, archive, mirrors, size, sha256)
    for member, md5 in [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]:
        if not check_integrity(folder / member, md5):
            raise UserError(f"{folder / member} is missing or damaged; delete {folder} and unpack {archive.name} again")
    splits = [dataset(root, train=True), dataset(root, train=False)]
    # torchvision's arrays are views of other memory: channels first
    images = [torch.from_numpy(split.data).contiguous().permute(0, 3, 1, 2) for split in splits]
    labels = [torch.tensor(split.targets) for split in splits]
    return Data(images[0], labels[0], images[1], labels[1], splits[0].classes, "CIFAR-10 archive")


def read_class_folders(root: Path) -> Data:
    """Load the images in `train/<class>/` and `test/<class>/`, as torchvision's ImageFolder finds them.

    Every file in a format that Pillow reads is loaded, except hidden ones, and must be 32x32. Grey and palette images
    become RGB. Raises UserError, which names the folder or file, for anything else.
    """
    files = {split: list_images(root / split) for split in ("train", "test")}
    classes = sorted(files["train"])
    for name in sorted(files["train"].keys() ^ files["test"].keys()):
        has, lacks = ("train", "test") if name in files["train"] else ("test", "train")
        raise UserError(f"{root / has / name} has no counterpart in {root / lacks}; both need the same classes")
    if len(classes) < 2:
        raise UserError(f"{root / 'train'} holds {len(classes)} class folder; a classifier needs two or more")
    tensors = []
    for split in ("train", "test"):
        paths = [path for name in classes for path in files[split][name]]
        pixels = np.empty((len(paths), 32, 32, 3), np.uint8)
        for i, path in enumerate(progress_bar(paths, desc=f"reading {root / split}", leave=False)):
            pixels[i] = read_image(path)
        tensors.append(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        tensors.append(torch.tensor([label for label, name in enumerate(classes) for _ in files[split][name]]))
    return Data(*tensors, classes, "class folders")


def list_images(folder: Path) -> dict[str, list[str]]:
    """Return the paths of the images under each class folder, by the folder's name."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; the images belong in train/<class>/ and test/<class>/")
    images = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            images[path.name] = find_images(path)
    return images


def find_images(folder: Path, skip_links: bool = False) -> list[str]:
    """Return the paths of the files under `folder` in a format that Pillow reads, except hidden ones.

    Raises UserError if there are none. Links to folders are never followed. Without `skip_links` they are user errors,
    because their images might belong to another class.
    """
    Image.init()
    readable = Image.OPEN.keys() - RECOGNISED_ONLY
    extensions = tuple(ext for ext, kind in Image.registered_extensions().items() if kind in readable)
    images, walked = [], []
    for parent, folders, names in os.walk(folder, onerror=raise_error):
        folders[:] = [name for name in folders if name[0] != "."]  # os.walk does not enter the others
        walked.append((parent, folders, names))
    for parent, folders, names in sorted(walked):
        for link in (os.path.join(parent, name) for name in folders):
            if os.path.islink(link) and not skip_links:
                raise UserError(f"{link} is a link to a folder; replace it with its images, or remove it")
        images += [
            os.path.join(parent, name)
            for name in sorted(names)
            if has_file_allowed_extension(name, extensions) and name[0] != "."
        ]
    if not images:
        raise UserError(f"{folder} holds no image in a format that Pillow reads; fill the folder or remove it")
    return images


def raise_error(error: OSError) -> NoReturn:
    """Raise the error. Without this, os.walk skips a folder that it may not read."""
    raise error


def as_seen(image: Image.Image) -> Image.Image:
    """Return the image in RGB, upright as the camera noted, and with white behind what is transparent."""
    image.load()
    with contextlib.suppress(Exception):  # notes that Pillow cannot read, of a picture that it has read
        image.getexif()
        image.info.pop("exif", None)  # the notes as bytes, which would be written anew; this fails for some notes
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_image(path: str | Path, resize: bool = False) -> np.ndarray:
    """Return an image's pixels: uint8 of shape (32, 32, 3).

    An image of another size is refused, unless `resize` is set. Then all of it is averaged over boxes, whatever its
    aspect ratio. Raises UserError if it is not an image of 8 bits a channel.
    """
    try:
        if not os.path.exists(path):
            if os.path.islink(path):
                raise UserError(f"{path} is a link to a file that is gone; remove it")
            raise UserError(f"{path} does not exist; name a picture or a folder of them")
        if not os.path.isfile(path):
            raise UserError(f"{path} is not a file; remove it")  # reading a pipe would block for ever
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # Pillow's advice on palettes
            if image.size != (32, 32) and not resize:
                raise UserError(f"{path} is {image.width}x{image.height}, not 32x32; resize or remove it")
            # convert() would clip modes of 16 and 32 bits a pixel to white. Pillow cuts 16-bit colours to 8 bits.
            deep = image.mode[0] in "IF" or any(";16" in str(tile) or tile[0] == "SGI16" for tile in image.tile)
            if image.format == "PPM" and image.mode != "1":
                deep |= any(tile[0] != "raw" and tile[3][1] > 255 for tile in image.tile)
            if deep:
                raise UserError(f"{path} has more than 8 bits a channel; convert or remove it")
            pixels = as_seen(image)
            if resize:
                pixels = pixels.resize((32, 32), Image.Resampling.BOX)
            return np.asarray(pixels)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        advice = "scale it down" if isinstance(error, Image.DecompressionBombError) else "repair or remove it"
        raise UserError(f"{path} is not a readable image ({error}); {advice}") from None
