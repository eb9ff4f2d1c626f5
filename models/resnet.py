"""torchvision's ResNet-18 (He et al., "Deep Residual Learning for Image Recognition", 2015), with stems for 32x32."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding and without bias, faster on a CPU on maps of 2x2 pixels and smaller.

    Those are the last ones of a ResNet on 32x32 images. Most of a kernel sees only padding there, which the CPU's
    convolution multiplies all the same; as one linear layer, from all pixels to all, nothing is multiplied in vain.
    """

    def __init__(self, in_channels, out_channels, stride, device=None):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1, bias=False, device=device)

    def forward(self, x):
        n, channels, *size = x.shape
        if max(size) > 2 or x.device.type != "cpu":
            return super().forward(x)
        # Of each pair of an output and an input pixel, the row and the column of the kernel that lies between them.
        rows, columns = (
            torch.arange(side) - torch.arange(0, side, stride)[:, None] + 1
            for side, stride in zip(size, self.stride, strict=True)
        )
        taps = 3 * rows[:, None, :, None] + columns[None, :, None, :]  # (output rows, columns, input rows, columns)
        weight = self.weight.to(x.dtype).permute(0, 2, 3, 1).flatten(1, 2).index_select(1, taps.flatten())
        out = F.linear(x.permute(0, 2, 3, 1).flatten(1), weight.view(-1, taps[0, 0].numel() * channels))
        return out.view(n, -1, *taps.shape[:2]).contiguous(memory_format=torch.channels_last)


class Block(BasicBlock):
    """torchvision's, with the convolutions above."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("conv1", "conv2"):  # ResNet initialises them, as it does torchvision's own
            conv = getattr(self, name)
            setattr(self, name, nn.utils.skip_init(Conv3x3, conv.in_channels, conv.out_channels, conv.stride))


class ResNet18(ResNet):
    """torchvision's resnet18, without weights, for `num_classes` classes. For a 32x32 image the stem is

    imagenet: as it comes, a 7x7 convolution of stride 2 and a max-pool, which leave 8x8 pixels to the first block;
    cifar: a 3x3 convolution of stride 1 and the max-pool, which leave 16x16;
    cifar-nopool: that convolution alone, which leaves 32x32 (section 4.2 of the paper, and pytorch-cifar).

    Takes images of shape (N, 3, 32, 32), float; returns logits of shape (N, num_classes).
    """

    def __init__(self, num_classes=10, stem="imagenet"):
        super().__init__(Block, [2, 2, 2, 2], num_classes=num_classes)
        self.arguments = {"num_classes": num_classes, "stem": stem}
        if stem != "imagenet":
            self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's are
        if stem == "cifar-nopool":
            self.maxpool = nn.Identity()
        # The ReLU after the max-pool: the same function for a quarter of the work.
        self.relu, self.maxpool = nn.Identity(), nn.Sequential(self.maxpool, self.relu)
        self.to(memory_format=torch.channels_last)
