"""mean_and_std.py: the definition, the datasets it takes, and the errors for others."""

import numpy as np
import pytest
import torch
from PIL import Image

from harness.data import load_data
from harness.terminal import UserError
from mean_and_std import get_mean_and_std, get_statistics, histograms

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (height, width, 3), np.uint8) // (i + 1) for i, (height, width) in enumerate(
    [(32, 32), (7, 50), (1, 2), (64, 3)]
)]  # fmt: skip


def by_definition(arrays):
    """Return mean, std and pixel_std of arrays (height, width, channels) with values from 0 to 1, in float64."""
    flat = [array.reshape(-1, array.shape[-1]).astype(np.float64) for array in arrays]
    return (
        np.mean([pixels.mean(0) for pixels in flat], 0),
        np.mean([pixels.std(0, ddof=1) for pixels in flat], 0),
        np.concatenate(flat).std(0),
    )


def check(dataset, arrays):
    for ours, theirs in zip(get_statistics(dataset), by_definition(arrays), strict=True):
        assert ours.dtype == torch.float64
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9)
    for ours, theirs in zip(get_mean_and_std(dataset), by_definition(arrays), strict=False):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)


@pytest.mark.parametrize(
    "convert",
    [
        Image.fromarray,
        lambda array: array,
        lambda array: array.astype(np.uint16) * 257,
        lambda array: array / 255,
        lambda array: torch.from_numpy(array).permute(2, 0, 1),
        lambda array: torch.from_numpy(array).permute(2, 0, 1).double() / 255,
    ],
    ids=["PIL", "uint8 array", "uint16 array", "float array", "uint8 tensor", "float tensor"],
)
def test_images_of_any_kind_and_size(convert):
    check([(convert(array), 0) for array in PICTURES], [array / 255 for array in PICTURES])


def test_grey_images():
    grey = [array[:, :, :1] for array in PICTURES]
    for dataset in ([(Image.fromarray(array[:, :, 0]), 0) for array in grey], [(array[:, :, 0], 0) for array in grey]):
        check(dataset, [array / 255 for array in grey])


@pytest.mark.parametrize("value", [None, 0, 254, 255], ids=str)
@pytest.mark.parametrize("shape", [(300, 3, 32, 32), (3, 1, 5, 61)], ids=str)
def test_the_repositorys_own_tensors(shape, value):
    images = torch.from_numpy(RNG.integers(0, 256, shape, np.uint8))
    if value is not None:  # nearly constant, where cancellation would show
        images = torch.where(images == 7, value ^ 1, value).to(torch.uint8)
    check(images, [image.permute(1, 2, 0).numpy() / 255 for image in images])


@pytest.mark.parametrize(
    "dataset, words",
    [
        ([], "the dataset is empty"),
        (torch.empty(0, 3, 32, 32, dtype=torch.uint8), "the dataset is empty"),
        (
            [(PICTURES[0], 0), (PICTURES[1][:, :, 0], 0), (PICTURES[2], 0)],
            "image 1 has 1 channels, the images before it have 3",
        ),
        ([(torch.rand(3, 4, 4), 0), (torch.full((3, 4, 4), torch.nan), 0)], "image 1 holds a value that is not finite"),
        ([(PICTURES[0], 0), (PICTURES[0], 0), (PICTURES[0][:1, :1], 0)], "image 2 has a single pixel"),
        (torch.zeros(4, 3, 1, 1, dtype=torch.uint8), "image 0 has a single pixel"),
        (np.zeros((4, 32, 32, 3), np.uint8), r"a ndarray of shape \(4, 32, 32, 3\) is not a dataset; pass samples"),
        (torch.zeros(4, 32, 32, 3, dtype=torch.uint8), r"image 0 has the shape \(32, 32, 3\), not \(C, H, W\)"),
        (torch.zeros(4, 32, 32, 3), r"image 0 has the shape \(32, 32, 3\), not \(C, H, W\)"),
        (torch.zeros(3, 32, 32), r"a Tensor of shape \(3, 32, 32\) is not a dataset"),
        ([(torch.zeros(8, 3, 32, 32), torch.zeros(8))], r"image 0 has the shape \(8, 3, 32, 32\)"),
        ([torch.zeros(3, 32, 32)], r"sample 0 is a Tensor, not \(image, label\)"),
        ([({"image": PICTURES[0]}, 0)], r"sample 0 is a tuple, not \(image, label\)"),
        ([{"image": PICTURES[0]}], r"sample 0 is a dict, not \(image, label\)"),
        ([("cat.png", 0)], r"sample 0 is a tuple, not \(image, label\)"),
        ([(torch.zeros(3, 4, 4, dtype=torch.int64), 0)], "image 0 has values of torch.int64, whose range is not known"),
        ([(torch.zeros(3, 4, 4, dtype=torch.int32), 0)], "image 0 has values of torch.int32"),
        ([(Image.fromarray(PICTURES[0]).convert("P"), 0)], "image 0 has a palette"),
        ([(Image.new("PA", (4, 4)), 0)], "image 0 has a palette"),
        ([(PICTURES[0], 0), (np.zeros((4, 4), ">u2"), 0)], "image 1 cannot be read as a tensor: .*byte order"),
        ([(np.zeros((0, 4, 3), np.uint8), 0)], "image 0 has no pixels"),
        ([(np.zeros((2, 3, 4, 4), np.uint8), 0)], r"image 0 has the shape \(2, 3, 4, 4\), not \(H, W\) or \(H, W, C\)"),
        ([(PICTURES[0], 0), (np.zeros(5), 0)], r"image 1 has the shape \(5,\), not"),
        (torch.zeros(2, 3, 0, 4, dtype=torch.uint8), "image 0 has no pixels"),
        ({0: (PICTURES[0], 0)}, "a dict cannot be indexed from 0; pass a map-style dataset"),
        (iter([]), "a list_iterator cannot be indexed"),
        (torch.utils.data.DataLoader([(torch.zeros(3, 4, 4), 0)]), "a DataLoader cannot be indexed from 0"),
        (
            type("Stream", (torch.utils.data.IterableDataset,), {"__len__": lambda _: 1, "__iter__": iter})(),
            "a Stream cannot be",
        ),
    ],
)
def test_what_it_refuses(dataset, words):
    with pytest.raises(UserError, match=words):
        get_statistics(dataset)


def test_the_script(script, refused, tmp_path, folders):
    flags = ["mean_and_std.py", "--data", folders]
    out = script(*flags, "--plot", "histograms.png").stdout.splitlines()
    assert out[-1] == "the histograms are in histograms.png"
    with Image.open(tmp_path / "histograms.png") as picture:
        assert picture.width > 1000
    assert not any("synthetic" in line for line in out)
    statistics = get_statistics(load_data(str(folders)).train_images)
    assert out[0] == f"mean, std of trainset: {statistics.mean.float()} {statistics.std.float()}"
    printed = [line.split()[1:4] for line in out if line.startswith(("mean ", "std "))]
    assert printed == [[f"{value:.8f}" for value in values] for values in statistics]
    assert "\nThese are synthetic images, not CIFAR-10.\n" in script("mean_and_std.py", "--data", "synthetic").stdout
    assert "nowhere" in refused(*flags, "--plot", "nowhere/histograms.png")
    assert "argument --plot: 'histograms' has no picture suffix" in refused(*flags, "--plot", "histograms")
    assert "argument --plot: 'histograms.xyz' has no picture suffix" in refused(*flags, "--plot", "histograms.xyz")


def test_a_channel_that_cannot_be_normalised(tmp_path):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    images[:, 2] = 0
    with pytest.raises(UserError, match="a channel is constant in each image"):
        histograms(images, get_statistics(images), tmp_path / "histograms.png")


@pytest.mark.long
def test_cifar10(cifar10_data):
    """All published digits agree."""
    statistics = get_statistics(cifar10_data.train_images)
    assert [[f"{value:.8f}" for value in values] for values in statistics] == [
        ["0.49139968", "0.48215841", "0.44653091"],
        ["0.20230092", "0.19941281", "0.20096161"],
        ["0.24703223", "0.24348513", "0.26158784"],
    ]
