"""The Muon optimizer, whose steps for convolutions have the same size in every direction."""

from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum that orthogonalises the step of each convolution and keeps its weights' norm.

    Taken as a matrix with a row for each output channel, the step of a convolution gets singular values of about 1,
    and the weights get the norm of a matrix whose rows have length 1 (Jordan et al., "Muon: An optimizer for hidden
    layers in neural networks", 2024). Parameters without four dimensions take a usual step of SGD with Nesterov
    momentum.
    """

    def __init__(
        self, params: Iterable, lr: float, momentum: float, weight_decay: float = 0, dtype: torch.dtype = torch.float32
    ):
        """Take the default settings of the groups. dtype: the precision in which the steps are orthogonalised."""
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Take a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                step = gradient.add(buffer, alpha=group["momentum"])
                if parameter.dim() == 4:
                    parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                    step = orthogonalize(step.flatten(1), self.dtype).to(step.dtype).view_as(step)
                parameter.add_(step, alpha=-group["lr"])


def orthogonalize(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix with its singular values brought to about 1, computed in this precision.

    Three steps of a Newton-Schulz iteration do this. Its coefficients raise small singular values fastest (see Muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)  # in this order, since float16 holds no small gradients
    if len(matrix) > matrix.shape[1]:
        x = x.T
    for _ in range(3):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x
