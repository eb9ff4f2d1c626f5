"""Download, check and unpack CIFAR-10 without training, on a machine with internet access, such as a login node.

python download.py               # into the folder data
python download.py --data DIR
"""

from pathlib import Path

from harness.data import load_data
from harness.terminal import CommandLine, run


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_data("the folder (default: data)")
    args = parser.parse_args()
    if args.data == "synthetic":
        parser.error("--data synthetic needs no download")
    data = load_data(args.data)
    images = f"{len(data.train_labels)} training and {len(data.test_labels)} test images"
    print(f"{images} of {len(data.classes)} classes ({data.source}) are in {Path(args.data).resolve()}")


if __name__ == "__main__":
    run(main)
