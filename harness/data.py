"""A dataset in memory: the original's files, class folders, the built-in images; and one image file."""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import make_dataset
from torchvision.datasets.utils import check_integrity

from harness.download import (
    CIFAR10_SHA256,
    CIFAR10_SIZE,
    CIFAR10_SOURCES,
    prepare,
)
from harness.synthetic import make_synthetic
from harness.terminal import UserError, progress_bar


class Data(NamedTuple):
    """A dataset in memory. Images are uint8 of shape (N, 3, 32, 32), channels-last; labels int64 of shape (N,)."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list[str]  # in the order of the labels
    source: str  # "CIFAR-10 archive", "class folders" or "synthetic"

    def fingerprint(self):
        """SHA-256 over every image, label and class name, in order: 64 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for tensor in self[:4]:
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


def load_data(name):
    """What lies in the folder `name`, or the built-in images where `name` is "synthetic". Raises UserError.

    Where there is nothing, CIFAR-10 is downloaded.
    """
    if name == "synthetic":
        return Data(*make_synthetic(), "synthetic")
    root = Path(name)
    if root.is_file():
        raise UserError(f"--data {name} is a file; name the folder that it lies in")
    if root.name == CIFAR10.base_folder:
        root = root.parent
    original = (root / CIFAR10.base_folder).is_dir() or (root / CIFAR10.filename).is_file()
    if not original and ((root / "train").is_dir() or (root / "test").is_dir()):
        return read_class_folders(root)
    return read_original(root)


def read_original(root, sources=CIFAR10_SOURCES, size=CIFAR10_SIZE, sha256=CIFAR10_SHA256, dataset=CIFAR10):
    """CIFAR-10 as its authors publish it: `cifar-10-batches-py`, downloaded and unpacked first where need be.

    The archive is unpacked only if its SHA-256 is `sha256`, and its members are unpickled only if each one's MD5 is
    the one that `dataset`, torchvision's class, lists. Raises UserError where one is not.
    """
    folder, archive = root / dataset.base_folder, root / dataset.filename
    if not folder.is_dir():
        prepare(folder, archive, sources, size, sha256)
    for member, md5 in [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]:
        if not check_integrity(folder / member, md5):
            raise UserError(f"{folder / member} is missing or damaged; delete {folder} and unpack {archive.name} again")
    splits = [dataset(root, train=True), dataset(root, train=False)]
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2) for split in splits]
    labels = [torch.tensor(split.targets) for split in splits]
    return Data(images[0], labels[0], images[1], labels[1], splits[0].classes, "CIFAR-10 archive")


def read_class_folders(root):
    """Images in `train/<class>/` and `test/<class>/`, as torchvision's ImageFolder finds them, classes by name.

    Every file that Pillow has a format for is read, hidden ones apart, and must be 32x32; grey and palette images
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


def list_images(folder):
    """A dict from each class folder's name to the paths of the images under it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; class folders lie in train/<class>/ and test/<class>/")
    images = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            images[path.name] = images_under(path)
    return images


def images_under(folder):
    """The paths of the files, at any depth, that Pillow has a format for, hidden ones apart. UserError without any."""
    Image.init()
    extensions = tuple(ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN)
    found = make_dataset(folder.parent, {folder.name: 0}, extensions=extensions, allow_empty=True)
    images = [path for path, _ in found if not os.path.basename(path).startswith(".")]
    if not images:
        raise UserError(f"{folder} holds no image; fill the folder or delete it")
    return images


def read_image(path, resize=False):
    """The image's pixels, an array of shape (32, 32, 3). Raises UserError if it is no whole image of 8 bits a channel.

    One of another size is refused, or with `resize` all of it is averaged over boxes.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # Pillow's advice on palettes; a huge image is refused below
            if image.size != (32, 32) and not resize:
                raise UserError(f"{path} is {image.width}x{image.height}, not 32x32; resize it or take it out")
            if image.mode[0] in "IF":  # 16 and 32 bits a pixel, which convert() would clip to white
                raise UserError(f"{path} has more than 8 bits a channel; convert it or take it out")
            pixels = image.convert("RGB")
            if resize:  # the right way up first, as a camera notes it
                pixels = ImageOps.exif_transpose(pixels).resize((32, 32), Image.Resampling.BOX)
            return np.asarray(pixels)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything at a damaged file
        raise UserError(f"{path} is no image that can be read ({error}); repair it or take it out") from None
