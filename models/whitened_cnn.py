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
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.arguments = {"num_classes": num_classes}
        self.whitening = nn.Conv2d(3, 24, 2, bias=False).requires_grad_(False)
        self.blocks = nn.Sequential(Block(24, 64), Block(64, 256), Block(256, 256))
        self.head = nn.Linear(256, num_classes, bias=False)
        nn.init.normal_(self.head.weight)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def whiten(self, images: torch.Tensor) -> None:
        """Set the first layer so that on these images 12 outputs have mean squares of about 1 and mean products of 0.

        The weights are the scaled eigenvectors of the patches' second moments. The other 12 outputs are the negatives.
        images: normalised, of shape (N, 3, H, W).
        """
        patches = F.unfold(images.float().cpu(), 2).transpose(1, 2).flatten(0, 1)  # (patches, 12)
        eigenvalues, eigenvectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
        filters = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T  # 5e-4 limits those of weak directions
        self.whitening.weight.copy_(torch.cat([filters, -filters]).view_as(self.whitening.weight))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.blocks(F.gelu(self.whitening(images))).amax((2, 3))
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
