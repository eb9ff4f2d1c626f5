"""The networks, and what they are built of. `model.arguments` holds the constructor's arguments, for checkpoints."""

from models.mobilenetv2 import MobileNetV2
from models.resnet import ResNet18
from models.tutorial_cnn import TutorialCNN
from models.views import SixViews
from models.whitened_cnn import WhitenedCNN

__all__ = ["MobileNetV2", "ResNet18", "SixViews", "TutorialCNN", "WhitenedCNN"]
