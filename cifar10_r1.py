"""Train r1: the network of PyTorch's official tutorial, then with random horizontal flips.

python cifar10_r1.py
python cifar10_r1.py --flip
python cifar10_r1.py --data synthetic      # without CIFAR-10, on the built-in images
python cifar10_r1.py --flip --resume       # resume after an interruption
python cifar10_r1.py --flip --evaluate     # only test
"""

import utils

import torch
from torch import nn

from models import TutorialCNN

EPOCHS = 26
BATCH_SIZE = 64  # with the tutorial's 4, an epoch takes 5 times as long (docs/speed.md)
LR = 0.008  # constant. The tutorial's 0.001 is for its small batch
MOMENTUM = 0.9  # the tutorial's, but in Nesterov's form
WEIGHT_DECAY = 1e-3  # the tutorial has none
PRECISION = "fp32"  # a network this small is no faster in bf16
MEAN = STD = (0.5, 0.5, 0.5)  # the tutorial's: pixels from 0 to 1 become -1 to 1


def main():
    parser = utils.ArgumentParser(__doc__, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=LR, precision=PRECISION)
    parser.add_argument("--flip", action="store_true", help="mirror a random half of the training images in each epoch")
    args = parser.parse_args()

    device = utils.set_up(args)
    data, train_loader, test_loader = utils.dataloaders(args, device, MEAN, STD, flip=args.flip)
    torch.manual_seed(args.seed)
    model = TutorialCNN(num_classes=len(data.classes)).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True
    )
    train_step = utils.TrainStep(model, criterion, optimizer, train_loader.dtype)

    checkpoints = utils.Checkpoints(args, data, train_loader, train_step)
    for epoch in checkpoints.epochs_left():
        train_metrics = utils.train(train_step, train_loader, epoch)
        test_metrics = utils.test(model, test_loader, criterion, epoch)
        checkpoints.save(epoch, train_metrics, test_metrics)
    utils.finish(checkpoints, data, model, test_loader)


if __name__ == "__main__":
    utils.run(main)
