"""torchvision's MobileNetV2 (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018)."""

import torch
from torch import nn
from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2
from torchvision.models.mobilenetv2 import InvertedResidual

from models.cpu_layers import StridedDepthwise


class MobileNetV2(TorchvisionMobileNetV2):
    """torchvision's mobilenet_v2, untrained and without its first two strides, so the last map is 4x4, not 1x1.

    Takes float images of shape (N, 3, 32, 32) and returns logits of shape (N, num_classes).
    """

    def __init__(self, num_classes: int = 10):
        stages = [  # table 2 of the paper: expansion, channels, blocks, stride of the first block
            [1, 16, 1, 1],
            [6, 24, 2, 1],  # 2 in the paper
            [6, 32, 3, 2],
            [6, 64, 4, 2],
            [6, 96, 3, 1],
            [6, 160, 3, 2],
            [6, 320, 1, 1],
        ]
        super().__init__(num_classes=num_classes, inverted_residual_setting=stages, block=Block)
        self.arguments = {"num_classes": num_classes}
        self.features[0][0].stride = (1, 1)  # the stem's, 2 in the paper
        for module in self.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = False  # in place it would first copy its input, which the backward pass needs
        self.to(memory_format=torch.channels_last)  # as the images are


class Block(InvertedResidual):
    """torchvision's block with this repository's strided depthwise convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *args, **kwargs):
        super().__init__(in_channels, out_channels, stride, *args, **kwargs)
        if stride == 2:  # these blocks expand first, so it is conv[1], which MobileNetV2 initialises like torchvision's
            self.conv[1][0] = nn.utils.skip_init(StridedDepthwise, self.conv[1][0].in_channels)
