"""The networks."""

import pytest
import torch
import torchvision

from models import ResNet18, TutorialCNN


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_tutorial_cnn():
    model = TutorialCNN(num_classes=10)
    assert count(model) == 62_006  # conv 456 + 2416, linear 48120 + 10164 + 850
    assert model(torch.randn(5, 3, 32, 32)).shape == (5, 10)
    assert TutorialCNN(num_classes=7)(torch.randn(5, 3, 32, 32)).shape == (5, 7)


def test_resnet18_is_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    torch.manual_seed(0)
    ours = ResNet18(num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("stem, size", [("imagenet", 8), ("cifar", 16), ("cifar-nopool", 32)])
def test_stems(stem, size):
    model = ResNet18(num_classes=4, stem=stem)
    assert model.arguments == {"num_classes": 4, "stem": stem}
    seen = []
    model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert seen == [(2, 64, size, size)]
    if stem != "imagenet":
        assert count(model) == count(ResNet18(num_classes=4)) - 64 * 3 * 40  # 3x3 for 7x7
