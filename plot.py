"""Draw pictures of training runs. A training script draws the pictures of its own run at its end.

python plot.py checkpoints/cifar10_r3                              # curves, confusion and mistakes, into its folder
python plot.py checkpoints/cifar10_r1 checkpoints/cifar10_r1-flip  # the curves of several runs, into comparison.png
python plot.py results/mine                                        # each seed's accuracy, from reproduce.py's records
"""

from pathlib import Path

import utils

import torch

from harness.data import load_data
from harness.devices import choose_device
from harness.drawing import COLORS, curves, draw_run, picture_path, seeds
from harness.files import read_checkpoint
from harness.loader import Loader
from harness.records import read_log
from harness.results import read_folder, summary
from harness.terminal import CommandLine, UserError, nonempty_path, run
from predict import load_classifier


def main() -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=nonempty_path, metavar="RUN", help="folder of a run, or of records as results/mine")
    add("--output", type=picture_path, metavar="FILE", help="for several runs (default: comparison.png)")
    parser.add_data()
    parser.add_device()
    args = parser.parse_args()

    if len(args.runs) > 1:
        if len(args.runs) > len(COLORS):
            parser.error(f"{len(args.runs)} runs are too many, there are {len(COLORS)} colours")
        names = [run.resolve().name for run in args.runs]
        if len(set(names)) < len(names):
            names = [*map(str, args.runs)]
        output = args.output or Path("comparison.png")
        curves(dict(zip(names, map(read_log, args.runs), strict=True)), output)
        print(f"the curves are in {output}")
        return
    if args.output:
        parser.error("--output is for several runs; the pictures of a single run go into its folder")
    (folder,) = args.runs
    if rows := read_folder(folder):
        for records in rows.values():
            summary(records)  # raises UserError if they are of different recipes
        seeds({row: [record["accuracy"] for record in records] for row, records in rows.items()}, folder / "seeds.png")
        print(f"each seed's accuracy is drawn in {folder / 'seeds.png'}")
        return
    read_log(folder)  # report what is missing before the data is read
    device = choose_device(args.device)
    path = folder / "last.pt"
    if not path.exists():
        raise UserError(f"{path} is missing; the pictures of a run need its last network")
    classifier, checkpoint = load_classifier(path, device), read_checkpoint(path)
    recipe = checkpoint.get("recipe")
    if not recipe:
        raise UserError(f"{path} is for inference and does not name its data; plot.py needs a run's own")
    if classifier.data == "class folders" and not (Path(args.data) / "train").exists():
        parser.error(f"{folder} was trained on class folders; name them with --data")  # instead of a download
    data = load_data("synthetic" if classifier.data == "synthetic" else args.data)
    if recipe.get("holdout"):
        data = data.hold_out()
    if data.fingerprint() != recipe["data"]:
        raise UserError(f"{folder} was trained on other data than --data {args.data}; pass its own")
    normalised = {"mean": checkpoint["mean"], "std": checkpoint["std"], "device": device, "dtype": torch.float32}
    loader = Loader(data.test_images, data.test_labels, utils.TEST_BATCH_SIZE, **normalised)
    logits = utils.predict(classifier.network, loader)
    draw_run(folder, logits, utils.confusion_matrix(logits, data.test_labels), data)


if __name__ == "__main__":
    run(main)
