"""Train r2: torchvision's resnet18 as it comes, with r1's flips, then with random crops.

python cifar10_r2.py
python cifar10_r2.py --crop
python cifar10_r2.py --crop --resume       # resume after an interruption
python cifar10_r2.py --crop --evaluate     # only test
"""

import utils

import torch
from torch import nn

from models import ResNet18

EPOCHS = {"flip": 15, "crop": 54}  # without crops it overfits sooner
BATCH_SIZE = 64  # smaller batches make batch-norm noisier, which should limit overfitting
LR = 4e-4  # constant, for AdamW
WEIGHT_DECAY = 0.05
MEAN = STD = (0.5, 0.5, 0.5)  # the tutorial's: pixels from 0 to 1 become -1 to 1


def main():
    parser = utils.ArgumentParser(__doc__, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=LR)
    parser.add_argument("--crop", action="store_true", help="shift each training image randomly by up to 4 pixels")
    args = parser.parse_args()
    args.epochs = args.epochs or EPOCHS["crop" if args.crop else "flip"]

    device = utils.set_up(args)
    crop = 4 if args.crop else 0  # pixels
    data, train_loader, test_loader = utils.dataloaders(args, device, MEAN, STD, flip=True, crop=crop)
    torch.manual_seed(args.seed)
    model = ResNet18(num_classes=len(data.classes)).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    train_step = utils.TrainStep(model, criterion, optimizer, train_loader.dtype)

    checkpoints = utils.Checkpoints(args, data, train_loader, train_step)
    for epoch in checkpoints.epochs_left():
        train_metrics = utils.train(train_step, train_loader, epoch)
        test_metrics = utils.test(model, test_loader, criterion, epoch)
        checkpoints.save(epoch, train_metrics, test_metrics)
    utils.finish(checkpoints, data, model, test_loader)


if __name__ == "__main__":
    utils.run(main)
