"""How many operations a network's training takes."""

import copy

import torch
from torch import nn

SIDE = 32  # pixels


def petaflop(model: nn.Module, images: int) -> float:
    """Return the operations of training on so many images, in 10^15."""
    return images * count_operations(model) / 1e15


def count_operations(model: nn.Module) -> int:
    """Return the floating-point operations of training on one image: those of convolutions and matrix products.

    A multiplication and an addition are two. Counted on the "meta" device, which computes nothing, so that it does not
    matter how a device computes a layer.
    """
    from torch.utils.flop_counter import FlopCounterMode  # a tenth of a second, which every start would take

    shadow = copy.deepcopy(model).to("meta").train()
    images = torch.empty(2, 3, SIDE, SIDE, device="meta")  # batch-norm cannot train on one
    with FlopCounterMode(display=False) as counter:
        shadow(images).sum().backward()
    return counter.get_total_flops() // len(images)
