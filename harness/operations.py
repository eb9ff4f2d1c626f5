"""The number of operations that a network's training takes."""

import copy
import math

import torch
from torch import nn

SIDE = 32  # pixels


def petaflop(model: nn.Module, images: int) -> float | None:
    """Return the operations of training on this many images, in 10^15, or None if they cannot be counted."""
    try:
        return images * count_operations(model) / 1e15
    except Exception as error:  # some networks do not run on "meta"; the figure is not worth a run's record
        print(f"operations not counted: {type(model).__name__} does not run on 'meta' ({type(error).__name__})")
        return None


def count_operations(model: nn.Module) -> int:
    """Return the floating-point operations of convolutions and matrix products in training on one image.

    A multiplication and an addition are two. They are counted on the "meta" device, which computes nothing, so that it
    does not matter how a device computes a layer.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it would slow down every start

    shadow = copy.deepcopy(model).to("meta").train()
    images = torch.empty(2, 3, SIDE, SIDE, device="meta")  # batch-norm cannot train on one image
    own = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        shadow(images).sum().backward()
    return counter.get_total_flops() // len(images)


def convolution_backward(gradient: torch.Size, images: torch.Size, weight: torch.Size, *arguments, out_shape) -> int:
    """Return the operations of a convolution's gradients. torch 2.14 counts a depthwise one as if it had no groups."""
    wanted = arguments[-1]  # whether gradients of images, weights and biases are wanted
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * (wanted[0] + wanted[1])
