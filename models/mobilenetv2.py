"""torchvision's MobileNetV2 (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018)."""

import torch
from torch import nn
from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2
from torchvision.models.mobilenetv2 import InvertedResidual


class StridedDepthwise(nn.Conv2d):
    """A 3x3 depthwise convolution of stride 2, without bias, on a CPU in the weights' precision also under autocast.

    In bf16 the CPU's backward pass of it takes 10 to 60 times as long: of this network's step it was a third.
    """

    def __init__(self, channels, device=None):
        super().__init__(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False, device=device)

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Block(InvertedResidual):
    """torchvision's, with the convolution above."""

    def __init__(self, in_channels, out_channels, stride, *args, **kwargs):
        super().__init__(in_channels, out_channels, stride, *args, **kwargs)
        if stride == 2:  # all of these expand first; MobileNetV2 initialises them, as it does torchvision's own
            self.conv[1][0] = nn.utils.skip_init(StridedDepthwise, self.conv[1][0].in_channels)


class MobileNetV2(TorchvisionMobileNetV2):
    """torchvision's mobilenet_v2, without weights, its first two strides taken out: the last map is 4x4, not 1x1.

    Takes images of shape (N, 3, 32, 32), float; returns logits of shape (N, num_classes).
    """

    def __init__(self, num_classes=10):
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
                module.inplace = False  # in place it would first copy what the backward pass needs
        self.to(memory_format=torch.channels_last)  # a quarter faster on the CPU in bf16, two thirds in fp32
