"""The network of PyTorch's official CIFAR-10 tutorial, "Training a Classifier"."""

import torch
from torch import nn


class TutorialCNN(nn.Module):
    """Two convolutions and three linear layers, 62,006 parameters for ten classes.

    Takes float images of shape (N, 3, 32, 32) and returns logits of shape (N, num_classes).
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.arguments = {"num_classes": num_classes}
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.MaxPool2d(2), nn.ReLU(),  # the tutorial puts the ReLU before the pool, which is
            nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU(),  # the same function for four times the work
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120), nn.ReLU(),
            nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, num_classes),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)  # as the images are

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).flatten(1))
