"""Classify pictures with a trained network.

python predict.py cat.jpg holiday/             # with a network from checkpoints/
python predict.py holiday/ --plot holiday.png  # draw them
python predict.py cat.jpg --json --checkpoint checkpoints/cifar10_r4-cifar/best.pt
python predict.py --export model.onnx          # for use without this repository; .pt2 for torch.export

Pictures of any size are scaled to 32x32 as in ImageNet32x32 (Chrabaszcz, Loshchilov and Hutter, "A Downsampled Variant
of ImageNet as an Alternative to the CIFAR datasets", 2017): the whole picture, whatever its shape, by averaging over
boxes. What is transparent becomes white. An object that fills the picture is classified best, as in CIFAR-10 itself.
"""

import argparse
import copy
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.terminal import CommandLine, UserError, escape_unprintable, nonempty_path, print_error, progress_bar, run

# isort: split
# PyTorch comes after our own, see harness/__init__.py
import torch
from torch import nn

import models
from harness.data import find_images, read_image
from harness.devices import choose_device, keep_freed_memory
from harness.files import read_checkpoint, write_atomically
from harness.shipped import shipped_file

BATCH_SIZE = 100  # so any number of pictures fits into memory
DEFAULT = "r5"  # the network in checkpoints/ that is used if none is named


class Classifier(nn.Module):
    """A trained network with everything needed to use it. `load_classifier` makes one.

    Takes images as `read_picture` returns them, uint8 of shape (N, 3, 32, 32), and returns logits, float32 of shape
    (N, classes).

    network: the module of models/, which takes normalised images; model: str, its name; classes: list[str]; mean, std:
    of the channels, as float32 of shape (3, 1, 1), for pixels from 0 to 1; data: str, what it was trained on; epoch:
    int; accuracy: float, in percent on the images `tested_on`, after that epoch. Only in its last epoch is r5 `--tta`
    tested with six views, while its Classifier always has them.
    """

    def __init__(self, network: nn.Module, checkpoint: dict):
        super().__init__()
        self.network, self.model = network, checkpoint["model"]
        self.classes, self.data = checkpoint["classes"], checkpoint["data"]
        self.epoch, self.accuracy = checkpoint["epoch"], checkpoint["accuracy"]
        self.tested_on = checkpoint.get("tested_on", "test")
        self.register_buffer("mean", torch.tensor(checkpoint["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(checkpoint["std"]).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images / 255 - self.mean) / self.std).float()


def load_classifier(name: str | Path = DEFAULT, device: str | torch.device = "cpu") -> Classifier:
    """Load the Classifier of a checkpoint in evaluation mode and without gradients.

    name: of a network in checkpoints/, such as "r5", or a file: `best.pt` or `last.pt` of a run. Raises UserError if
    the file is missing, damaged, or of a network that is not in models/.
    """
    path = shipped_file(name)
    checkpoint = read_checkpoint(path)
    model = checkpoint["model"]
    if model not in models.__all__:
        raise UserError(f"{path} holds a network {model!r}; models/ has {', '.join(models.__all__)}")
    try:
        with torch.random.fork_rng(devices=[]):  # drawing the initial weights must not change the caller's random state
            network = getattr(models, model)(**checkpoint["arguments"])
        network.load_state_dict(checkpoint["weights"])
        if checkpoint.get("flags", {}).get("tta"):  # r5's last epoch is then tested with six views
            network = models.SixViews(network)
        classifier = Classifier(network, checkpoint)
    except (KeyError, TypeError, ValueError, RuntimeError):  # from another version of the network
        raise UserError(f"{path} holds a different {model} from the one in models/ now") from None
    return classifier.eval().requires_grad_(False).to(device)


def read_picture(path: str | Path) -> torch.Tensor:
    """Return a picture of any size as uint8 of shape (3, 32, 32). Raise UserError if it cannot be read."""
    return torch.from_numpy(read_image(path, resize=True).transpose(2, 0, 1).copy())


def likeliest_classes(
    classifier: Classifier, paths: Sequence[str | Path], errors: list[UserError]
) -> Iterator[tuple[str | Path, dict[str, float]]]:
    """Yield each picture's path, and the probabilities of its three likeliest classes by class.

    A picture that cannot be read is left out, and its error is added to `errors`.
    """
    for first in range(0, len(paths), BATCH_SIZE):
        batch, images = [], []
        for path in paths[first : first + BATCH_SIZE]:
            try:
                images.append(read_picture(path))
                batch.append(path)
            except UserError as error:
                errors.append(error)
        if not images:
            continue
        logits = classifier(torch.stack(images).to(classifier.mean.device))
        top = logits.softmax(1).topk(min(3, len(classifier.classes)))
        for path, probabilities, indices in zip(batch, top.values.tolist(), top.indices.tolist(), strict=True):
            yield path, {classifier.classes[i]: p for i, p in zip(indices, probabilities, strict=True)}


def export(classifier: Classifier, path: Path) -> None:
    """Write the classifier to a file that runs without this repository, .onnx or .pt2 (torch.export).

    It takes `images`, uint8 of shape (N, 3, 32, 32) for any N, and returns `probabilities`, float32 of shape
    (N, classes). The names of the classes are in the ONNX file's metadata and the .pt2's extra file, as a JSON list.
    Raises UserError if a package is missing or the file cannot be written.
    """
    plain = copy.deepcopy(classifier).cpu().to(memory_format=torch.contiguous_format)  # torch.export warns of others
    network = nn.Sequential(plain, nn.Softmax(1))
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    classes = json.dumps(classifier.classes)
    if path.suffix == ".pt2":
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={"classes": classes})
        write_atomically(path, content.getbuffer())
        return
    try:
        onnx = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["probabilities"], verbose=False
        )
    except ImportError:
        raise UserError("--export to .onnx needs two more packages: pip install onnx onnxscript") from None
    onnx.model.metadata_props["classes"] = classes
    write_atomically(path, onnx.model_proto.SerializeToString())


def exported_file(name: str) -> Path:
    """Return the path of a file to export to."""
    path = nonempty_path(name)
    if path.suffix not in (".onnx", ".pt2"):
        raise argparse.ArgumentTypeError(f"{name!r} is not a name for --export; end it in .onnx or .pt2")
    return path


def picture_file(name: str) -> Path:
    """Return the path of a picture to draw."""
    from harness.drawing import picture_path  # here, because it imports matplotlib, which would make every start slower

    return picture_path(name)


def main() -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("pictures", nargs="*", type=nonempty_path, metavar="IMAGE", help="a file, or a folder of them")
    add(
        "--checkpoint",
        type=nonempty_path,
        default=DEFAULT,
        metavar="NAME",
        help="a network in checkpoints/, or best.pt or last.pt of a run (default: %(default)s)",
    )
    parser.add_device()
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=picture_file, metavar="FILE", help="draw the first 40 pictures with their likeliest classes")
    add("--export", type=exported_file, metavar="FILE", help="only write the network to a .onnx or .pt2 file")
    args = parser.parse_args()
    if bool(args.pictures) == bool(args.export):
        parser.error("name pictures to classify, or a file to --export the network to")

    keep_freed_memory()
    classifier = load_classifier(args.checkpoint, choose_device(args.device))
    classes = ", ".join(classifier.classes) + " (synthetic images)" * (classifier.data == "synthetic")
    if args.export:
        export(classifier, args.export)
        takes = f"{args.export} takes images, uint8 of shape (N, 3, 32, 32), and returns probabilities of {classes}"
        print(escape_unprintable(takes))
        return
    network = {
        "checkpoint": str(args.checkpoint),
        "network": classifier.model,
        "trained_on": classifier.data,
        "classes": classifier.classes,
        "epoch": classifier.epoch,
        "tested_on": classifier.tested_on,
        "test_accuracy": classifier.accuracy,
    }
    if not args.json:
        known = f"epoch {classifier.epoch}, {classifier.accuracy:.1f} % of the {classifier.tested_on} images right"
        print(escape_unprintable(f"{args.checkpoint}: {classifier.model}, {known}; trained on {classes}"))
    paths = []
    for given in args.pictures:
        paths += find_images(given, skip_links=True) if given.is_dir() else [given]
    predictions, errors = [], []
    with progress_bar(total=len(paths), leave=False) as bar:
        for path, probabilities in likeliest_classes(classifier, paths, errors):
            predictions.append({"file": str(path), "probabilities": probabilities})
            if not args.json:
                percentages = ", ".join(f"{name} {100 * p:.1f} %" for name, p in probabilities.items())
                bar.write(escape_unprintable(f"{path}: {percentages}"), file=sys.stdout)
            bar.update()
    if args.json:
        print(json.dumps(network | {"predictions": predictions}, indent=1))
    if args.plot and predictions:
        from harness.drawing import pictures

        drawn = pictures([(each["file"], each["probabilities"]) for each in predictions], args.plot)
        which = "the pictures" if drawn == len(predictions) else f"the first {drawn} of {len(predictions)} pictures"
        print(f"{which} are in {args.plot}", file=sys.stderr if args.json else sys.stdout)
    for error in errors[:-1]:
        print_error(f"error: {error}")
    if errors:
        raise errors[-1]


if __name__ == "__main__":
    run(main)
