"""Train r3: continue r2 --crop, with images normalised by the dataset's own mean and std.

python cifar10_r3.py --resume       # first from cifar10_r2.py --crop, later from its own last epoch
python cifar10_r3.py --evaluate     # only test
"""

import utils

import torch
from torch import nn

from models import ResNet18

BASE = ("cifar10_r2-crop", "python cifar10_r2.py --crop")  # the run that this one continues, and its command
EPOCHS = 70  # r2's 54, and 16 more
BATCH_SIZE = 64  # smaller batches make batch-norm noisier, which should limit overfitting
LR = 4e-4  # constant, for AdamW
WEIGHT_DECAY = 0.05
MEAN = (0.4914, 0.4822, 0.4465)  # of the training images' channels, computed by mean_and_std.py
STD = (0.2023, 0.1994, 0.2010)  # the mean of the images' own stds, as in much CIFAR-10 code


def main():
    parser = utils.ArgumentParser(__doc__, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=LR)
    args = parser.parse_args()

    device = utils.set_up(args)
    data, train_loader, test_loader = utils.dataloaders(args, device, MEAN, STD, flip=True, crop=4)
    torch.manual_seed(args.seed)
    model = ResNet18(num_classes=len(data.classes)).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    train_step = utils.TrainStep(model, criterion, optimizer, train_loader.dtype)

    checkpoints = utils.Checkpoints(args, data, train_loader, train_step, base=BASE)
    for epoch in checkpoints.epochs_left():
        train_metrics = utils.train(train_step, train_loader, epoch)
        test_metrics = utils.test(model, test_loader, criterion, epoch)
        checkpoints.save(epoch, train_metrics, test_metrics)
    utils.finish(checkpoints, data, model, test_loader)


if __name__ == "__main__":
    utils.run(main)
