"""Train MobileNetV2, a network made for phones with a fifth of ResNet-18's parameters, much as in r4.

python train_mobilenetv2.py
python train_mobilenetv2.py --resume     # resume after an interruption
python train_mobilenetv2.py --evaluate   # only test
"""

import utils

import torch
from torch import nn

from models import MobileNetV2

EPOCHS = 54  # nearly two and a half hours on two CPU cores
BATCH_SIZE = 256
LR = 0.2  # at the peak of the schedule
PEAK = 0.25  # where in the run the peak is, from 0 to 1
MOMENTUM = 0.9
WEIGHT_DECAY = 4e-4
LABEL_SMOOTHING = 0.1
CUTOUT = 8  # pixels; against overfitting
JITTER = 0.14  # of brightness and contrast
MEAN = (0.4914, 0.4822, 0.4465)  # of the training images' channels, computed by mean_and_std.py
STD = (0.2023, 0.1994, 0.2010)  # the mean of the images' own stds, as in much CIFAR-10 code


def main():
    parser = utils.ArgumentParser(__doc__, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=LR)
    args = parser.parse_args()

    device = utils.set_up(args)
    augmentation = dict(flip="alternating", crop=4, reflect=True, cutout=CUTOUT, jitter=JITTER)
    data, train_loader, test_loader = utils.dataloaders(args, device, MEAN, STD, **augmentation)
    torch.manual_seed(args.seed)
    model = MobileNetV2(num_classes=len(data.classes)).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True
    )
    scheduler = utils.triangular_schedule(optimizer, args.epochs, PEAK)
    train_step = utils.TrainStep(model, criterion, optimizer, train_loader.dtype)

    checkpoints = utils.Checkpoints(args, data, train_loader, train_step, scheduler)
    for epoch in checkpoints.epochs_left():
        train_metrics = utils.train(train_step, train_loader, epoch)
        test_metrics = utils.test(model, test_loader, criterion, epoch)
        scheduler.step()  # before the save, which stores it
        checkpoints.save(epoch, train_metrics, test_metrics)
    utils.finish(checkpoints, data, model, test_loader)


if __name__ == "__main__":
    utils.run(main)
