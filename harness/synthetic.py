"""The built-in images, for a machine that cannot reach any mirror of CIFAR-10."""

import numpy as np
import torch

SHAPES = {  # u, v: offsets from the centre in pixels, to the right and down; r: the radius, 6 to 10 pixels
    "bars": lambda u, v, r: (np.maximum(abs(u), abs(v)) <= r) & (v % 6 < 3),
    "columns": lambda u, v, r: (np.maximum(abs(u), abs(v)) <= r) & (u % 6 < 3),
    "cross": lambda u, v, r: (np.maximum(abs(u), abs(v)) <= r) & (np.minimum(abs(u), abs(v)) * 4 <= r),
    "diamond": lambda u, v, r: abs(u) + abs(v) <= r,
    "disc": lambda u, v, r: u * u + v * v <= r * r,
    "frame": lambda u, v, r: (np.maximum(abs(u), abs(v)) <= r) & (np.maximum(abs(u), abs(v)) * 2 >= r),
    "ring": lambda u, v, r: (u * u + v * v <= r * r) & (u * u + v * v > r * r // 3),
    "saltire": lambda u, v, r: (np.maximum(abs(u), abs(v)) <= r) & (abs(abs(u) - abs(v)) * 4 <= r),
    "square": lambda u, v, r: np.maximum(abs(u), abs(v)) <= r,
    "triangle": lambda u, v, r: (2 * abs(u) <= v + r) & (v <= r),
}


def make_synthetic() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Return training images and labels, test images and labels, and the classes: ten shapes in random places.

    Images: uint8 of shape (10000 or 2000, 3, 32, 32), channels-last; labels: int64. They are the same on every
    machine, because they are whole numbers from NumPy's legacy generator, whose stream never changes.
    """
    rng = np.random.RandomState(0)
    y, x = np.mgrid[:32, :32]
    splits = []
    for count in (1000, 200):  # images for each class
        pixels = np.empty((len(SHAPES), count, 3, 32, 32), np.uint8)
        for shape, out in zip(SHAPES.values(), pixels, strict=True):
            cx, cy, r = (rng.randint(low, high, (count, 1, 1)) for low, high in ((11, 21), (11, 21), (6, 11)))
            mask = shape(x - cx, y - cy, r)[:, None]
            background = rng.randint(40, 146, (count, 3, 1, 1), np.int16)
            contrast = rng.randint(30, 91, (count, 3, 1, 1), np.int16)
            noise = rng.randint(-60, 61, (count, 3, 32, 32), np.int16)
            out[:] = np.clip(background + contrast * mask + noise, 0, 255)
        splits.append(torch.from_numpy(pixels).flatten(0, 1).contiguous(memory_format=torch.channels_last))
        splits.append(torch.arange(len(SHAPES)).repeat_interleave(count))
    return *splits, list(SHAPES)
