"""Train r4: a ResNet-18 from scratch with a learning-rate schedule, then with a stem that fits 32x32 images.

python cifar10_r4.py
python cifar10_r4.py --stem cifar            # a 3x3 first layer with stride 1 instead of 7x7 with stride 2
python cifar10_r4.py --stem cifar-nopool     # also without the max-pool, at four times the computation
python cifar10_r4.py --stem cifar --resume   # resume after an interruption
python cifar10_r4.py --stem cifar --evaluate # only test
"""

import utils

import torch
from torch import nn

from models import ResNet18

EPOCHS = {"imagenet": 25, "cifar": 120, "cifar-nopool": 40}  # the cifar stems take two to three hours on two CPU cores
BATCH_SIZE = {"imagenet": 256, "cifar": 128, "cifar-nopool": 128}  # with the next two lines, cifar's 128 gained 0.5
LR = {"imagenet": 0.2, "cifar": 0.1, "cifar-nopool": 0.1}  # at the peak of the schedule
PEAK = {"imagenet": 0.25, "cifar": 0.1, "cifar-nopool": 0.1}  # where in the run the peak is, from 0 to 1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4  # with SGD and Nesterov momentum, the usual choice for a ResNet on CIFAR-10
LABEL_SMOOTHING = {"imagenet": 0.1, "cifar": 0.2, "cifar-nopool": 0.2}  # the cifar stems overfit sooner
CUTOUT = {"imagenet": 8, "cifar": 16, "cifar-nopool": 16}  # pixels; like label smoothing, against overfitting
JITTER = {"imagenet": 0, "cifar": 0.14, "cifar-nopool": 0.14}  # of brightness and contrast
MEAN = (0.4914, 0.4822, 0.4465)  # of the training images' channels, computed by mean_and_std.py
STD = (0.2023, 0.1994, 0.2010)  # the mean of the images' own stds, as in much CIFAR-10 code


def main():
    parser = utils.ArgumentParser(__doc__, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=LR)
    parser.add_argument("--stem", choices=EPOCHS, default="imagenet", help="the first layers (default: %(default)s)")
    args = parser.parse_args()
    args.epochs = args.epochs or EPOCHS[args.stem]
    args.batch_size = args.batch_size or BATCH_SIZE[args.stem]
    args.lr = args.lr or LR[args.stem]

    device = utils.set_up(args)
    augmentation = dict(crop=4, cutout=CUTOUT[args.stem], jitter=JITTER[args.stem])
    augmentation |= dict(flip=True) if args.stem == "imagenet" else dict(flip="alternating", reflect=True)
    data, train_loader, test_loader = utils.dataloaders(args, device, MEAN, STD, **augmentation)
    torch.manual_seed(args.seed)
    model = ResNet18(num_classes=len(data.classes), stem=args.stem).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING[args.stem])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True
    )
    scheduler = utils.triangular_schedule(optimizer, args.epochs, PEAK[args.stem])
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
