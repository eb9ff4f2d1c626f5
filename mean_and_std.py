"""Compute the mean and the std that images are normalised with.

python mean_and_std.py                        # of CIFAR-10's training images, in the folder data
python mean_and_std.py --plot histograms.png  # and draw the pixels before and after normalisation
"""

from pathlib import Path
from typing import NamedTuple

from harness.terminal import CommandLine, UserError, progress_bar, run

# isort: split
# PyTorch comes after our own, see harness/__init__.py
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms.v2.functional import to_dtype, to_image

from harness.data import load_data
from harness.drawing import own_settings, picture_path, save

WANTED = "samples (image, label), or all images as one tensor of shape (N, C, H, W)"


class Statistics(NamedTuple):
    """Statistics of a dataset's channels, for values from 0 to 1: three float64 tensors of shape (channels,).

    mean: each image's own mean, averaged over images. std: each image's own std (n - 1), averaged over images.
    pixel_std: the std over all pixels of all images.
    """

    mean: torch.Tensor
    std: torch.Tensor
    pixel_std: torch.Tensor


def get_mean_and_std(dataset: Dataset | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each image's mean and std (n - 1), averaged over images: float32 of shape (channels,).

    See `get_statistics` for what `dataset` may be.
    """
    statistics = get_statistics(dataset)
    return statistics.mean.float(), statistics.std.float()


def get_statistics(dataset: Dataset | torch.Tensor) -> Statistics:
    """Return the Statistics of a dataset in one pass, accumulated in float64.

    dataset: a map-style dataset of (image, label), or images alone as one tensor of shape (N, C, H, W). An image is a
    PIL image in grey or colours, an array of shape (H, W) or (H, W, C), or a tensor of shape (C, H, W). Sizes may
    differ. There are up to 4 channels. Values of 8 or 16 bits are divided by the largest value of their type, and
    floats are taken as they are.

    Raises UserError if there is no image, or if an image is something else, has other channels than the images before
    it, has a single pixel and so no std, or holds a value that is not finite. The error names the first such image.
    """
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not indexed or isinstance(dataset, dict | IterableDataset):
        raise UserError(f"a {type(dataset).__name__} cannot be indexed from 0; pass a map-style dataset of {WANTED}")
    if isinstance(dataset, torch.Tensor | np.ndarray) and (isinstance(dataset, np.ndarray) or dataset.dim() != 4):
        raise UserError(f"a {type(dataset).__name__} of shape {tuple(dataset.shape)} is not a dataset; pass {WANTED}")
    if len(dataset) == 0:
        raise UserError("the dataset is empty; mean and std need an image or more")
    if isinstance(dataset, torch.Tensor) and dataset.dtype == torch.uint8 and dataset[0].numel():
        check_image(0, dataset[0])
        pixels, means, squares = dataset[0, 0].numel(), *moments_of_uint8(dataset)
    else:
        pixels, means, squares = moments_of_images(dataset)
    mean = means.mean(0)
    pixels = torch.as_tensor(pixels, dtype=torch.double).expand(len(means))[:, None]
    if (pixels == 1).any():
        single = (pixels == 1).flatten().nonzero()[0].item()
        raise UserError(f"image {single} has a single pixel, and so no std; take it out")
    deviation = means - (pixels * means).sum(0) / pixels.sum()  # of each image's mean from the mean over all pixels
    pixel_std = ((squares + pixels * deviation**2).sum(0) / pixels.sum()).sqrt()
    return Statistics(mean, (squares / (pixels - 1)).sqrt().mean(0), pixel_std)


def moments_of_uint8(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each image's means and sums of squared deviations, float64 of shape (N, C), exact but for rounding."""
    n, channels, height, width = tensor.shape
    sums, squares = (torch.empty(n, channels, dtype=torch.double) for _ in range(2))
    for start in range(0, n, 128):  # images that fit into the cache as floats
        # A float32 holds every sum of 256 squares of 8 bits: 256 * 255**2 < 2**24.
        values = tensor[start : start + 128].flatten(2).float()
        parts = values.split(256, dim=2)
        sums[start : start + 128] = sum(part.sum(2).double() for part in parts)
        squares[start : start + 128] = sum(part.square().sum(2).double() for part in parts)
    pixels = height * width
    return sums / pixels / 255, (pixels * squares - sums**2) / pixels / 255**2


def moments_of_images(dataset: Dataset | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each image's number of pixels, int64 of shape (N,), then its moments as `moments_of_uint8` does."""
    pixels, means, squares = [], [], []
    for i in progress_bar(range(len(dataset)), desc="mean and std", leave=False):
        image = dataset[i] if isinstance(dataset, torch.Tensor) else image_of(i, dataset[i])
        if not isinstance(image, torch.Tensor):
            try:
                image = to_image(image)
            except (TypeError, ValueError) as error:  # such as 16 bits in another computer's byte order
                raise UserError(f"image {i} cannot be read as a tensor: {error}") from None
        check_image(i, image)
        image = to_dtype(image.cpu(), torch.double, scale=True).flatten(1)
        if means and len(image) != len(means[0]):
            raise UserError(f"image {i} has {len(image)} channels, the images before it have {len(means[0])}")
        if not image.isfinite().all():
            raise UserError(f"image {i} holds a value that is not finite; repair it or take it out")
        means.append(image.mean(1))
        squares.append((image - means[-1][:, None]).square().sum(1))
        pixels.append(image.shape[1])
    return torch.tensor(pixels), torch.stack(means), torch.stack(squares)


def image_of(i: int, sample: object) -> object:
    """Return the image of a sample (image, label). Raise UserError if there is none."""
    image = sample[0] if isinstance(sample, tuple | list) and sample else sample
    if isinstance(sample, torch.Tensor | np.ndarray) or not isinstance(image, Image.Image | torch.Tensor | np.ndarray):
        raise UserError(f"sample {i} is a {type(sample).__name__}, not (image, label); pass {WANTED}")
    if isinstance(image, np.ndarray) and image.ndim not in (2, 3):
        raise UserError(f"image {i} has the shape {image.shape}, not (H, W) or (H, W, C); pass {WANTED}")
    if isinstance(image, Image.Image) and image.mode in ("P", "PA"):
        raise UserError(f"image {i} has a palette, whose numbers are not colours; convert it to RGB")
    return image


def check_image(i: int, image: torch.Tensor) -> None:
    """Raise UserError if this is no (C, H, W) image, or if its type does not tell its values' range."""
    if image.dim() != 3 or len(image) > 4:
        shape = tuple(image.shape)
        raise UserError(f"image {i} has the shape {shape}, not (C, H, W) with up to 4 channels; pass {WANTED}")
    if image.numel() == 0:
        raise UserError(f"image {i} has no pixels; take it out")
    if not image.is_floating_point() and image.dtype not in (torch.uint8, torch.uint16, torch.int16, torch.int8):
        raise UserError(f"image {i} has values of {image.dtype}, whose range is not known; convert them to uint8")


@own_settings
def histograms(tensor: torch.Tensor, statistics: Statistics, path: Path, title: str = "") -> None:
    """Draw the histogram of each channel of `tensor`, uint8 (N, 3, H, W), before and after normalisation.

    Raises UserError if a channel has the std 0.
    """
    if not statistics.std.all():
        raise UserError("a channel is constant in each image, so its std is 0; no histogram of its normalised values")
    figure = Figure(figsize=(11, 4), layout="constrained")
    if title:
        figure.suptitle(title)
    axes = figure.subplots(1, 2, sharey=True)
    styles = {"red": ("#d55e00", "-"), "green": ("#009e73", "--"), "blue": ("#0072b2", ":")}
    counts = [torch.bincount(tensor[:, channel].flatten(), minlength=256) for channel in range(len(styles))]
    shares = [100 * count / count.sum() for count in counts]
    top = max(share.max().item() for share in shares)
    for channel, (share, (name, (color, line))) in enumerate(zip(shares, styles.items(), strict=True)):
        value, (m, s, pixel_std) = torch.arange(256) / 255, (values[channel].item() for values in statistics)
        for axis, x, centre, width in (
            (axes[0], value, m, pixel_std),
            (axes[1], (value - m) / s, 0, pixel_std / s),
        ):
            axis.plot(x, share, line, color=color, linewidth=1.2, label=f"{name}: mean {m:.4f}, std {s:.4f}")
            height = (-0.03 - 0.03 * channel) * top  # below the axis, one line per channel
            axis.errorbar(centre, height, xerr=width, fmt="o", color=color, markersize=4, capsize=3)
    axes[0].set(xlabel="value of the pixel", ylabel="share of the pixels, in percent", title="before: from 0 to 1")
    axes[0].set_ylim(-0.14 * top, 1.45 * top)  # with room for the legend
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if 0 <= tick <= top])
    axes[0].text(-0.03, -0.06 * top, "mean and std\nof all pixels", va="center", size="small")
    axes[1].set(xlabel="(value - mean) / std", title="after normalisation")
    axes[0].legend(loc="upper left", frameon=False, title="normalised with", alignment="left")
    save(figure, path)


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_data()
    parser.add_argument("--plot", type=picture_path, metavar="FILE", help="draw the histograms into this file")
    args = parser.parse_args()
    data = load_data(args.data)
    statistics = get_statistics(data.train_images)
    print("mean, std of trainset:", statistics.mean.float(), statistics.std.float())
    title = ""
    if data.source == "synthetic":
        title = "synthetic images, not CIFAR-10"
        print(f"These are {title}.")
    print()
    for name, values, what in (
        ("mean", statistics.mean, "the mean over all pixels, which is also the mean of the images' means."),
        (
            "std",
            statistics.std,
            "each image's own std, averaged: how much the pixels of one image differ from one another.",
        ),
        (
            "std",
            statistics.pixel_std,
            "the std over all pixels of all images: larger, since images differ in brightness too.",
        ),
    ):
        print(f"{name:4} {' '.join(f'{value:.8f}' for value in values)}  {what}")
    print()
    print("cifar10_r3.py and the later scripts use the first std, as much CIFAR-10 code does, so that figures can be")
    print("compared. Only with the second do the normalised pixels have a std of 1. A network trains with either.")
    if args.plot:
        histograms(data.train_images, statistics, args.plot, title)
        print(f"the histograms are in {args.plot}")


if __name__ == "__main__":
    run(main)
