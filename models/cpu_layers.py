"""Convolutions that a CPU computes faster in another way.

On other devices, and where torch.compile or torch.export traces them, they are torch's own.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight


def has_own_way(x: torch.Tensor) -> bool:
    """Return whether these layers compute x in a way of their own. A tracer cannot follow SideBySide's gradient."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias, by default with padding. On maps of up to 2x2 pixels it is one linear layer.

    The last maps of a ResNet on 32x32 images are this small. There most of a kernel sees only padding, which the CPU's
    convolution multiplies all the same. On larger maps, up to 8x8 pixels, the gradient of the weights is computed on
    several images side by side in bf16. Together they make a training step of ResNet-18 in bf16 2.0 to 2.8 times as
    fast with the imagenet stem, and 1.2 to 1.8 times with the cifar stems (two cores of an Intel Xeon with AMX,
    docs/speed.md).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 1,
        device=None,
    ):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=padding, bias=False, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, weight = max(x.shape[2:]), self.kernels()
        if has_own_way(x):
            if side <= 2 and self.padding == (1, 1):
                return self.as_linear(x, weight)
            if side <= SideBySide.SIDE and x.dtype == torch.bfloat16 and torch.is_grad_enabled():
                return SideBySide.apply(x, weight.to(x.dtype), self.stride, self.padding)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)

    def kernels(self) -> torch.Tensor:
        """Return the weights of all output channels."""
        return self.weight

    def as_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the convolution's output, computed as one linear layer from all pixels to all pixels."""
        n, channels, *size = x.shape
        # For each pair of an output and an input pixel, the row and the column of the kernel that connect them.
        rows, columns = (
            torch.arange(side) - torch.arange(0, side, stride)[:, None] + 1
            for side, stride in zip(size, self.stride, strict=True)
        )
        taps = 3 * rows[:, None, :, None] + columns[None, :, None, :]  # (output rows, columns, input rows, columns)
        weight = weight.to(x.dtype).permute(0, 2, 3, 1).flatten(1, 2).index_select(1, taps.flatten())
        out = F.linear(x.permute(0, 2, 3, 1).flatten(1), weight.view(-1, taps[0, 0].numel() * channels))
        return out.view(n, self.out_channels, *taps.shape[:2]).contiguous(memory_format=torch.channels_last)


class SideBySide(torch.autograd.Function):
    """A 3x3 convolution whose gradient of the weights is computed on several images side by side.

    oneDNN adds each image's gradient to the sum in memory. On small maps this takes longer than the multiplications.
    With 10 images in a row the sum is touched a tenth as often. On two cores of an Intel Xeon with AMX, a step of
    ResNet-18 in bf16 is up to 1.2 times as fast, and r5's 1.1 times (docs/speed.md). On two cores of an AMD EPYC
    without AMX, r5's is 1.08 times as fast, and r2's takes 1.09 times as long (commit 7be169f).
    """

    SIDE = 8  # pixels; larger maps have more multiplications for each image's sum
    IMAGES = 10

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (x, weight), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        of_x = conv2d_input(x.shape, weight, gradient, stride, padding) if ctx.needs_input_grad[0] else None
        # A column of zeros separates neighbouring gradients, two without padding. So gradient i begins at column
        # i * (width + zeros). Its image begins at stride times that column. Zeros that no image reaches are cut off.
        zeros = 2 - padding[1]
        x = in_rows(x, stride[1] * (gradient.shape[3] + zeros) - x.shape[3])
        gradient = in_rows(gradient, zeros)[:, :, :, : (x.shape[3] + 2 * padding[1] - 3) // stride[1] + 1]
        return of_x, conv2d_weight(x, weight.shape, gradient, stride, padding), None, None


def in_rows(images: torch.Tensor, columns: int) -> torch.Tensor:
    """Return images side by side in rows, with `columns` columns of zeros after each image.

    From shape (N, C, H, W) to (N / IMAGES, C, H, IMAGES * (W + columns)). The last row is filled up with zeros.
    """
    missing = -len(images) % SideBySide.IMAGES
    if missing:
        images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
    lines = images.permute(0, 2, 3, 1).unflatten(0, (-1, SideBySide.IMAGES)).transpose(1, 2)
    return F.pad(lines, (0, 0, 0, columns)).flatten(2, 3).permute(0, 3, 1, 2)


class StridedDepthwise(nn.Conv2d):
    """A 3x3 depthwise convolution of stride 2, without bias. On a CPU it keeps the weights' precision under autocast.

    PyTorch is slow at these in bf16. Computing MobileNetV2's three in float32 makes a training step 1.4 times as fast
    (two cores of an Intel Xeon with AMX, docs/speed.md).
    """

    def __init__(self, channels: int, device=None):
        super().__init__(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not has_own_way(x):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
