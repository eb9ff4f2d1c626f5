"""torchvision's ResNet-18 (He et al., "Deep Residual Learning for Image Recognition", 2015), with stems for 32x32."""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from models.cpu_layers import Conv3x3


class ResNet18(ResNet):
    """torchvision's resnet18, untrained, with one of three stems:

    imagenet: torchvision's, a 7x7 convolution of stride 2 and a max-pool, which leave 8x8 pixels of a 32x32 image;
    cifar: a 3x3 convolution of stride 1 and the max-pool, which leave 16x16;
    cifar-nopool: the 3x3 convolution alone, which leaves 32x32 (section 4.2 of the paper, and pytorch-cifar).

    Takes float images of shape (N, 3, 32, 32) and returns logits of shape (N, num_classes).
    """

    def __init__(self, num_classes: int = 10, stem: str = "imagenet"):
        super().__init__(Block, [2, 2, 2, 2], num_classes=num_classes)
        self.arguments = {"num_classes": num_classes, "stem": stem}
        if stem != "imagenet":
            self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
        # ResNet calls relu, then maxpool. The other order is the same function and does a quarter of the ReLU's work.
        pool = nn.Identity() if stem == "cifar-nopool" else self.maxpool
        self.maxpool = nn.Sequential(pool, self.relu)
        self.relu = nn.Identity()
        self.to(memory_format=torch.channels_last)


class Block(BasicBlock):
    """torchvision's block with this repository's 3x3 convolution, which ResNet initialises like torchvision's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("conv1", "conv2"):
            conv = getattr(self, name)
            setattr(self, name, nn.utils.skip_init(Conv3x3, conv.in_channels, conv.out_channels, conv.stride))
