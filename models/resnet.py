"""torchvision's ResNet-18 (He et al., "Deep Residual Learning for Image Recognition", 2015), with stems for 32x32."""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class ResNet18(ResNet):
    """torchvision's resnet18, without weights, for `num_classes` classes. For a 32x32 image the stem is

    imagenet: as it comes, a 7x7 convolution of stride 2 and a max-pool, which leave 8x8 pixels to the first block;
    cifar: a 3x3 convolution of stride 1 and the max-pool, which leave 16x16;
    cifar-nopool: that convolution alone, which leaves 32x32 (section 4.2 of the paper, and pytorch-cifar).

    Takes images of shape (N, 3, 32, 32), float; returns logits of shape (N, num_classes).
    """

    def __init__(self, num_classes=10, stem="imagenet"):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        self.arguments = {"num_classes": num_classes, "stem": stem}
        if stem != "imagenet":
            self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's are
            self.to(memory_format=torch.channels_last)  # on the CPU too; there the imagenet stem is slower in it
        if stem == "cifar-nopool":
            self.maxpool = nn.Identity()
