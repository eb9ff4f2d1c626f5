"""The small network of airbench (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024).

Its blocks have SiLU instead of GELU, as in hiverge/cifar10-speedrun.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.cpu_layers import Conv3x3


class WhitenedCNN(nn.Module):
    """A frozen first layer that whitens patches of 2x2 pixels, then six 3x3 convolutions, 1.97 million parameters.

    Takes float images of shape (N, 3, H, W), of 16x16 pixels or more, and returns logits of shape (N, num_classes).
    `whiten` sets the first layer.

    mirrored: half of the kernels are mirror images of the other half. So a 32x32 image and its mirror image have the
    same logits, up to rounding (Cohen and Welling, "Group Equivariant Convolutional Networks", 2016).
    """

    def __init__(self, num_classes: int = 10, mirrored: bool = False):
        super().__init__()
        self.arguments = {"num_classes": num_classes, "mirrored": mirrored}
        self.mirrored = mirrored
        self.whitening = nn.Conv2d(3, 24, 2, bias=False).requires_grad_(False)
        if mirrored:
            blocks = [MirroredBlock(24, 64, symmetric=12), MirroredBlock(64, 256), MirroredBlock(256, 256)]
        else:
            blocks = [Block(24, 64), Block(64, 256), Block(256, 256)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(128 if mirrored else 256, num_classes, bias=False)
        nn.init.normal_(self.head.weight)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def whiten(self, images: torch.Tensor) -> None:
        """Set the first layer so that on these images 12 outputs have mean squares of about 1 and mean products of 0.

        The weights are the scaled eigenvectors of the patches' second moments. The other 12 outputs are the negatives.
        If the network is mirrored, the moments include the patches' mirror images. Then each filter's mirror image is
        the filter itself or its negative. Filters of the first kind come first, with their negatives.
        images: normalised, of shape (N, 3, H, W).
        """
        patches = F.unfold(images.float().cpu(), 2).transpose(1, 2).flatten(0, 1)  # (patches, 12)
        moments = (patches.T @ patches / len(patches)).double()
        if self.mirrored:
            mirror = torch.eye(12, dtype=torch.double).view(3, 2, 2, 3, 2, 2).flip(5).reshape(12, 12)
            moments = (moments + mirror @ moments @ mirror) / 2
            # Grey images give equal eigenvalues. There 1e-6 tells symmetric eigenvectors from antisymmetric ones.
            eigenvalues, eigenvectors = torch.linalg.eigh(moments + 1e-6 * mirror)
            signs = (eigenvectors * (mirror @ eigenvectors)).sum(0).round()
            eigenvalues -= 1e-6 * signs
        else:
            eigenvalues, eigenvectors = torch.linalg.eigh(moments)
        eigenvalues.clamp_(min=0)  # rounding makes some negative, for example those of white images
        scaled = eigenvectors / (eigenvalues + 5e-4).sqrt()  # 5e-4 limits the filters of weak directions
        filters = scaled.T.reshape(12, 3, 2, 2)
        groups = [filters[signs > 0], filters[signs < 0]] if self.mirrored else [filters]
        self.whitening.weight.copy_(torch.cat([sign * group for group in groups for sign in (1, -1)]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.blocks(F.gelu(self.whitening(images))).amax((2, 3))
        if self.mirrored:
            features = features.unflatten(1, (2, -1)).mean(1)
        return self.head(features) / features.shape[1]


class Block(nn.Module):
    """Two convolutions with a max-pool between them. Each begins as the identity, as far as its shape allows.

    The pool leaves out an odd map's last row and column, so the convolution before it does not compute them.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1, self.norm1 = Conv3x3(in_channels, out_channels, padding=0), BatchNorm(out_channels)
        self.conv2, self.norm2 = Conv3x3(out_channels, out_channels), BatchNorm(out_channels)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight[: conv.in_channels])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (1, 1 - width % 2, 1, 1 - height % 2))  # zeros, which an odd map needs only at its start
        x = F.silu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.silu(self.norm2(self.conv2(x)))


class BatchNorm(nn.BatchNorm2d):
    """Batch-norm without a learnt scale. It averages over the last few batches only, because the run is so short."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False


class MirroredBlock(nn.Module):
    """A block that answers a mirrored image with mirrored outputs, in which both halves of the channels are swapped.

    The first `symmetric` inputs have no halves: they are mirrored only.
    The pool takes three columns, so that it leaves out none of an odd map's, which would not be symmetric.
    """

    def __init__(self, in_channels: int, out_channels: int, symmetric: int = 0):
        super().__init__()
        self.conv1 = MirroredConv3x3(in_channels, out_channels, symmetric, padding=(0, 1))
        self.conv2 = MirroredConv3x3(out_channels, out_channels)
        self.norm1, self.norm2 = MirroredBatchNorm(out_channels), MirroredBatchNorm(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 1, 1 - x.shape[2] % 2))  # rows of zeros, which an odd map needs only at its start
        x = F.silu(self.norm1(F.max_pool2d(self.conv1(x), (2, 3), 2)))
        return F.silu(self.norm2(self.conv2(x)))


class MirroredConv3x3(Conv3x3):
    """A Conv3x3 whose second half of kernels are the mirror images of the first, for inputs as in MirroredBlock.

    Both halves are parameters, so that Muon makes their steps orthogonal to each other. They are averaged before use.
    """

    def __init__(self, in_channels: int, out_channels: int, symmetric: int = 0, padding: int | tuple[int, int] = 1):
        super().__init__(in_channels, out_channels, padding=padding)
        self.parts = [symmetric, (in_channels - symmetric) // 2, (in_channels - symmetric) // 2]
        nn.init.dirac_(self.weight[: symmetric + self.parts[1]])
        with torch.no_grad():
            self.weight[out_channels // 2 :] = self.mirrored()[out_channels // 2 :]

    def kernels(self) -> torch.Tensor:
        return (self.weight + self.mirrored()) / 2

    def mirrored(self) -> torch.Tensor:
        """Return the weights whose output for a mirrored input is this layer's, mirrored, with both halves swapped."""
        symmetric, first, second = self.weight.split(self.parts, dim=1)
        return torch.cat([symmetric, second, first], 1).roll(self.out_channels // 2, 0).flip(3)


class MirroredBatchNorm(BatchNorm):
    """A BatchNorm that averages over both halves of the channels."""

    def __init__(self, channels: int):
        super().__init__(channels // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        pairs = x.permute(0, 2, 3, 1).reshape(n, height, 2 * width, channels // 2).permute(0, 3, 1, 2)
        return super().forward(pairs).permute(0, 2, 3, 1).reshape(n, height, width, channels).permute(0, 3, 1, 2)
