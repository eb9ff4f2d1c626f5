"""The Muon optimizer, and the number of operations that a network takes."""

import torch
from torch import nn

from harness.muon import Muon
from harness.operations import count_operations, petaflop
from models import ResNet18, TutorialCNN


def test_other_parameters_take_a_step_of_sgd():
    ours, theirs = (torch.nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1}
    optimizers = Muon(ours.parameters(), **settings), torch.optim.SGD(theirs.parameters(), nesterov=True, **settings)
    for _ in range(3):
        images = torch.randn(8, 5)
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            network(images).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()])


def test_a_convolutions_step_has_singular_values_of_about_1():
    for shape in ((8, 4, 3, 3), (64, 2, 3, 3)):  # more columns than rows, and more rows
        weight = torch.nn.Parameter(torch.randn(shape))
        optimizer = Muon([weight], lr=0.5, momentum=0.6)
        for _ in range(2):
            before = weight.detach() * len(weight) ** 0.5 / weight.norm()
            weight.grad = torch.randn(shape) * 1000
            optimizer.step()
            step = (before - weight.detach()) / 0.5
            assert ((values := torch.linalg.svdvals(step.flatten(1))) > 0.4).all() and (values < 1.4).all()


def test_operations():
    """An addition and a multiplication are two. Backward is twice forward, without the gradient of the images."""
    convolution1, convolution2, linear = 3 * 6 * 25 * 28**2, 6 * 16 * 25 * 10**2, 400 * 120 + 120 * 84 + 84 * 10
    assert count_operations(TutorialCNN()) == 2 * (3 * (convolution1 + convolution2 + linear) - convolution1)
    model = ResNet18(stem="cifar")
    assert 0.041 < 50_000 * count_operations(model) / 1e15 < 0.043  # PFLOP an epoch
    assert model.conv1.weight.device.type == "cpu"


def test_operations_of_a_depthwise_convolution():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    assert count_operations(model) == 2 * 32 * 32 * (2 * 3 * 8 + 3 * 8 * 9)  # no gradient of the images


def test_a_network_whose_operations_cannot_be_counted(capsys):
    class Gate(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) if x.sum() > 0 else x  # "meta" has no values

    assert petaflop(Gate(3072, 10), 50_000) is None
    assert capsys.readouterr().out.startswith("operations not counted: Gate does not run on 'meta' (")
