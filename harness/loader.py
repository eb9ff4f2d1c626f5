"""Batches on the device: their order, flips, crops, normalisation, jitter and cutout."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from harness.processes import RANK, WORLD_SIZE
from harness.terminal import UserError

SIDE = 32  # pixels
PIXEL = 3  # bytes: red, green and blue, side by side
ROW = SIDE * PIXEL  # bytes
GROUP = 4  # images that share a transform's draw, because each call of a transform has a fixed cost


class Loader:
    """Batches (images, labels) of a dataset on the device, for training (in random order) or for testing.

    images: uint8 of shape (N, 3, 32, 32); labels: int64 of shape (N,). Each batch is normalised by `mean` and `std`,
    given for each channel and pixel values from 0 to 1, and comes as `dtype`, channels-last.

    flip: mirror a random half of the images, as torchvision's RandomHorizontalFlip() does. If "alternating", mirror
    each image in every second epoch (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024).
    crop: shift each image by up to so many pixels, as RandomCrop(32, padding=crop) does.
    reflect: fill the border of a shifted image with its mirror image instead of black.
    jitter: add a random number from -jitter to jitter to each normalised image, which changes its brightness, then
    multiply it by one from 1 - jitter to 1 + jitter, which changes its contrast.
    cutout: grey out a square of this side around a random pixel (DeVries and Taylor, "Improved Regularization of
    Convolutional Neural Networks with Cutout", 2017).
    transform: of torchvision.transforms.v2, after flip and crop. It draws from PyTorch's global generator, which
    `utils.train` seeds for each epoch and process.

    All other draws of an epoch depend on the seed and the epoch alone. `set_epoch` sets the epoch.

    Raises UserError if there are more processes than images to share, or if `flip` or `crop` has no meaning.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        dtype: torch.dtype,
        training: bool = False,
        seed: int = 0,
        flip: bool | str = False,
        crop: int = 0,
        reflect: bool = False,
        jitter: float = 0,
        cutout: int = 0,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        if crop is True:
            raise UserError("crop=True: crop is a number of pixels now; use crop=4")
        if not 0 <= crop < SIDE:
            raise UserError(f"crop={crop}: use a number of pixels from 0 to {SIDE - 1}")
        if flip not in (False, True, "alternating"):
            raise UserError(f"flip={flip!r}: use True or 'alternating'")
        self.images, self.labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        self.mean, self.std, self.device, self.dtype = list(mean), list(std), device, dtype
        self.shift, self.scale = (255 * torch.tensor(v, device=device).repeat(SIDE * SIDE) for v in (mean, std))
        self.training, self.seed, self.epoch = training, seed, 0
        self.flip, self.crop, self.reflect, self.jitter = flip, crop, reflect, jitter
        self.cutout, self.transform = cutout, transform
        # Batch sizes differ by at most one. No batch has one image, on which batch-norm may fail, unless all have. So
        # batches of 2 may have a third.
        n = len(labels)
        count = max(1, min(math.ceil(n / batch_size), n // 2)) if batch_size > 1 else n
        batches = torch.arange(n).tensor_split(count)
        # Every process gets a share of each batch. In training the shares differ by at most one, in testing some may be
        # empty, but none in the first batch, which is among the largest.
        shared = len(batches[-1] if training else batches[0])
        if shared < WORLD_SIZE:
            images, purpose = "1 image" if shared == 1 else f"{shared} images", "training" if training else "testing"
            raise UserError(f"{WORLD_SIZE} processes cannot share {images} for {purpose}")
        self.smallest_share = shared // WORLD_SIZE
        shares = [(batch.tensor_split(WORLD_SIZE)[RANK], len(batch)) for batch in batches]
        shares = [(share, size) for share, size in shares if len(share)]
        self.positions = torch.cat([share for share, _ in shares])  # of this process's images, in the epoch's order
        self.batch_sizes = [len(share) for share, _ in shares]
        # DDP averages over ranks. Weighting each loss by its share of the batch makes that the average over images.
        self.weights = [WORLD_SIZE * len(share) / size for share, size in shares]

    def __len__(self) -> int:
        return len(self.batch_sizes)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order and the augmentation of the images."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Drawn on the CPU, so that every device gets the same draws.
        n, generator = len(self.labels), torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(n, generator=generator) if self.training else torch.arange(n)
        flips = torch.randint(2, (n,), generator=generator).bool()
        if self.flip == "alternating":
            generator_of_all = torch.Generator().manual_seed(epoch_seed(self.seed, 0))
            flips = torch.randint(2, (n,), generator=generator_of_all)[order] != self.epoch % 2
        rows, columns = torch.randint(2 * self.crop + 1, (2, n), generator=generator)
        cut_rows, cut_columns = torch.randint(SIDE, (2, n), generator=generator)
        brightness, contrast = self.jitter * torch.rand(2, n, 1, generator=generator).mul(2).sub(1)
        draws = (order, flips, rows, columns, cut_rows, cut_columns, brightness, contrast)
        on_cuda = self.device.type == "cuda"  # elsewhere non_blocking may read freed memory (pytorch issue 139550)
        draws = [draw[self.positions].to(self.device, non_blocking=on_cuda) for draw in draws]
        at_a_time = 512 if self.device.type == "cpu" else 2048  # few enough for a CPU's cache, many enough for a GPU
        batches_at_a_time, start = math.ceil(at_a_time / self.batch_sizes[0]), 0
        for first in range(0, len(self), batches_at_a_time):
            sizes = self.batch_sizes[first : first + batches_at_a_time]
            stop = start + sum(sizes)
            images, labels = self.prepare(*(draw[start:stop] for draw in draws))
            yield from zip(images.split(sizes), labels.split(sizes), strict=True)
            start = stop

    def prepare(
        self, order, flips, rows, columns, cut_rows, cut_columns, brightness, contrast
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images and labels at the indices `order`, augmented with these draws, one for each image."""
        # Each image is a row of bytes, because index_select copies contiguous memory as a whole, while indexing with a
        # tensor goes byte by byte.
        images = self.images.permute(0, 2, 3, 1).flatten(1).index_select(0, order)
        if self.crop:
            images = crop(images, rows, columns, self.crop, self.reflect)
        if self.flip:
            images = flip(images, flips)
        if self.transform:
            images = transform_groups(images, self.transform)
        images = images.float().sub_(self.shift).div_(self.scale)
        if self.jitter:
            images.add_(brightness).mul_(1 + contrast)
        images = images.to(self.dtype).unflatten(1, (SIDE, SIDE, PIXEL)).permute(0, 3, 1, 2)
        if self.cutout:
            cut_out(images, cut_rows, cut_columns, self.cutout)
        if self.device.type == "mps":  # see TrainStep
            images = images.contiguous()
        return images, self.labels[order]


def crop(
    images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, padding: int, reflect: bool = False
) -> torch.Tensor:
    """Return, for each image, the 32x32 window of the padded image whose top left corner is at (row, column).

    images: uint8 of shape (N, 3072), an image's bytes row by row; rows, columns: int64 of shape (N,). The `padding`
    pixels around the image are black, or with `reflect` its mirror image.
    """
    n, device, side = len(images), images.device, SIDE + 2 * padding
    if reflect:
        lines = mirror_ends(images.view(n, SIDE, ROW), padding)
        padded = mirror_ends(lines.unflatten(2, (SIDE, PIXEL)), padding, dim=2)
    else:
        padded = F.pad(images.view(n, SIDE, ROW), (PIXEL * padding, PIXEL * padding, padding, padding))
    lines = padded.flatten().unfold(0, ROW, PIXEL)  # a view: any 32 consecutive pixels
    corners = torch.arange(0, side * side * n, side * side, device=device) + side * rows + columns
    window = corners[:, None] + torch.arange(0, side * SIDE, side, device=device)  # where the window's lines begin
    return lines.index_select(0, window.flatten()).view(n, SIDE * ROW)


def mirror_ends(images: torch.Tensor, padding: int, dim: int = 1) -> torch.Tensor:
    """Return the images with `padding` mirrored pixels at both ends of a dimension. F.pad does not reflect uint8."""
    first, last = images.narrow(dim, 1, padding), images.narrow(dim, -1 - padding, padding)
    return torch.cat([first.flip(dim), images, last.flip(dim)], dim)


def flip(images: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Return the images, bytes as in `crop`, mirrored where `flips`, bool of shape (N,), is true."""
    mirrored = images.view(-1, SIDE, SIDE, PIXEL).flip(2).flatten(1)
    # torch.where goes value by value, so int64 values make it take 8 bytes at a time.
    return torch.where(flips[:, None], mirrored.view(torch.int64), images.view(torch.int64)).view(torch.uint8)


def transform_groups(images: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the images, bytes as in `crop`, transformed with one draw of `transform` for each GROUP of images.

    transform: of torchvision.transforms.v2; takes and returns uint8 of shape (N, 3, 32, 32). Raises UserError if it
    does not.
    """
    images = images.view(-1, SIDE, SIDE, PIXEL).permute(0, 3, 1, 2)
    transformed = torch.cat([transform(group) for group in images.split(GROUP)])
    if (transformed.shape, transformed.dtype) != (images.shape, images.dtype):
        was, became = (f"{some.dtype} of shape {tuple(some.shape)}" for some in (images, transformed))
        raise UserError(f"the transform turns {was} into {became}; leave out what changes type or size")
    return transformed.permute(0, 2, 3, 1).flatten(1)


def cut_out(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, side: int) -> None:
    """Set a square around (row, column) of each image to 0, the mean colour, where it lies inside the image.

    images: normalised, of shape (N, 3, 32, 32); rows, columns: int64 of shape (N,), from 0 to 31.
    """
    pixels, half = torch.arange(SIDE, device=images.device), side // 2
    in_row, in_column = ((pixels - centre[:, None] + half) // side == 0 for centre in (rows, columns))
    images.masked_fill_((in_row[:, :, None] & in_column[:, None, :])[:, None], 0)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed for the draws of one epoch. It has 32 bits, all that PyTorch's CPU generator takes."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
