"""Batches on the device: their order, flips, crops, cutout and normalisation."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from harness.processes import RANK, WORLD_SIZE
from harness.terminal import UserError


class Loader:
    """Batches (images, labels) of a split, "train" or "test", that lies on the device as one tensor of `data`'s.

    Images come normalised, as `dtype`, channels-last, labels as int64; those for training in random order. With `crop`,
    each image is a random 32x32 window of itself with 4 black pixels around, and with `flip` every second one is
    mirrored, as torchvision's RandomCrop(32, padding=4) and RandomHorizontalFlip() have it. `cutout` greys a square of
    that side around a random pixel (DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with
    Cutout", 2017). What an epoch draws depends on (seed, epoch) alone: `set_epoch` says which. Each of several
    processes has its part of every batch.
    """

    def __init__(self, data, split, batch_size, *, mean, std, device, dtype, seed=0, flip=False, crop=False, cutout=0):
        images, labels = (
            (data.train_images, data.train_labels) if split == "train" else (data.test_images, data.test_labels)
        )
        self.images, self.labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        self.data, self.classes = data, data.classes
        self.mean, self.std = list(mean), list(std)
        self.shift, self.scale = (255 * torch.tensor(v, device=device).repeat(32 * 32) for v in (mean, std))
        self.device, self.dtype = device, dtype
        self.seed, self.epoch, self.shuffle = seed, 0, split == "train"
        self.flip, self.crop, self.cutout = flip, crop, cutout
        # Batches whose sizes differ by at most one; no batch of one image, on which batch-norm could not train.
        n = len(labels)
        count = max(1, min(math.ceil(n / batch_size), n // 2)) if batch_size > 1 else n
        batches = torch.arange(n).tensor_split(count)
        shared = len(batches[-1]) if self.shuffle else n  # of each training batch every process has its part
        if shared < WORLD_SIZE:
            raise UserError(f"{WORLD_SIZE} processes cannot share {shared} image{'s' * (shared > 1)} for {split}ing")
        self.smallest_share = shared // WORLD_SIZE
        shares = [(batch.tensor_split(WORLD_SIZE)[RANK], len(batch)) for batch in batches]
        shares = [(part, size) for part, size in shares if len(part)]
        self.mine = torch.cat([part for part, _ in shares])  # which images of the epoch are this process's
        self.batch_sizes = [len(part) for part, _ in shares]
        # DistributedDataParallel averages over processes; so weighted, that is the average over the images of a batch.
        self.weights = [WORLD_SIZE * len(part) / size for part, size in shares]

    def __len__(self):
        return len(self.batch_sizes)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        # Drawn on the CPU, so that every device gets the same.
        n, generator = len(self.labels), torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        flips = torch.randint(2, (n,), generator=generator).bool()
        rows, columns = torch.randint(9, (2, n), generator=generator)
        cut_rows, cut_columns = torch.randint(32, (2, n), generator=generator)
        draws = (order, flips, rows, columns, cut_rows, cut_columns)
        draws = [draw[self.mine].to(self.device, non_blocking=True) for draw in draws]
        at_a_time = 512 if self.device.type == "cpu" else 2048  # few enough for a CPU's cache, many enough for a GPU
        per_chunk, start = math.ceil(at_a_time / self.batch_sizes[0]), 0
        for first in range(0, len(self), per_chunk):
            sizes = self.batch_sizes[first : first + per_chunk]
            stop = start + sum(sizes)
            images, labels = self.chunk(*(draw[start:stop] for draw in draws))
            yield from zip(images.split(sizes), labels.split(sizes), strict=True)
            start = stop

    def chunk(self, order, flips, rows, columns, cut_rows, cut_columns):
        # A row an image, its pixels one after another: what lies together in memory, index_select copies as a whole.
        # Indexing with a tensor goes byte by byte, and so does torch.where, but for the 8 bytes of an int64.
        n = len(order)
        images = self.images.permute(0, 2, 3, 1).flatten(1).index_select(0, order)
        if self.crop:
            padded = F.pad(images.view(n, 32, 96), (12, 12, 4, 4))  # 40x40 pixels an image
            lines = padded.flatten().unfold(0, 96, 3)  # any 32 pixels in a row, a view
            corners = torch.arange(0, 1600 * n, 1600, device=self.device) + 40 * rows + columns
            window = corners[:, None] + torch.arange(0, 1280, 40, device=self.device)
            images = lines.index_select(0, window.flatten()).view(n, 3072)
        if self.flip:
            mirrored = images.view(n, 32, 32, 3).flip(2).flatten(1)
            images = torch.where(flips[:, None], mirrored.view(torch.int64), images.view(torch.int64)).view(torch.uint8)
        images = images.float().sub_(self.shift).div_(self.scale).to(self.dtype)
        images = images.unflatten(1, (32, 32, 3)).permute(0, 3, 1, 2)
        if self.cutout:
            pixel, half = torch.arange(32, device=self.device), self.cutout // 2
            in_row, in_column = ((pixel - c[:, None] + half) // self.cutout == 0 for c in (cut_rows, cut_columns))
            images.masked_fill_((in_row[:, :, None] & in_column[:, None, :])[:, None], 0)
        return images, self.labels[order]


def epoch_seed(seed, epoch):
    """A 32-bit seed for the draws of one epoch, all that PyTorch's CPU generator takes."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
