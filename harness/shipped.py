"""The trained networks that the repository ships: small files in checkpoints/, each from a run with a record."""

from pathlib import Path

from harness.files import read_checkpoint, write_atomically, write_checkpoint
from harness.results import RESULTS, per_class_table, read_record
from harness.terminal import UserError

FOLDER = RESULTS.parent / "checkpoints"
MEMBERS = ("model", "arguments", "classes", "mean", "std", "data", "tested_on", "epoch")  # of a run's last.pt


def shipped_file(name: str | Path) -> Path:
    """Return the file of the shipped network of that name, or the name as a path. Raise UserError if neither exists."""
    for path in (FOLDER / f"{name}.pt", Path(name)):
        if path.exists():
            return path
    shipped = ", ".join(path.stem for path in sorted(FOLDER.glob("*.pt")))
    raise UserError(f"no {name}; train that run first, or use one of the networks in checkpoints/: {shipped}")


def ship(name: str | Path, run: Path, record_name: str) -> Path:
    """Write the last network of a run as the shipped network `name`, and its picture of mistakes. Return its file.

    Matrices and kernels are stored as float16, vectors as they are, because the variances of batch-norm can be small.
    Raises UserError unless the run's record is in results/, under the name `record_name`.
    """
    if not (run / "run.json").exists():
        raise UserError(f"{run} is not the folder of a finished run; finish it first")
    content, checkpoint = (run / "run.json").read_bytes(), read_checkpoint(run / "last.pt")
    records = [path for path in sorted(RESULTS.glob(f"*/{record_name}")) if path.read_bytes() == content]
    records = [path for path in records if not path.parent.name.startswith("mine")]  # which Git ignores
    if not records:
        raise UserError(f"{run / 'run.json'} is not in results/; copy it into one of its folders as {record_name}")
    record = read_record(records[0])
    if record["epochs"] != checkpoint["rows"]:
        raise UserError(f"{run} has been resumed since its record was written; finish it first")
    if not (run / "mistakes.png").exists():
        raise UserError(f"{run / 'mistakes.png'} is missing; python plot.py {run} draws it")
    network = {member: checkpoint[member] for member in MEMBERS} | {
        "flags": checkpoint["recipe"]["flags"],
        "accuracy": record["accuracy"],
        "record": str(records[0].relative_to(RESULTS)),
        "commit": record["commit"],
        "weights": {
            key: tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor
            for key, tensor in checkpoint["weights"].items()
        },
    }
    path = FOLDER / f"{name}.pt"
    write_checkpoint(path, network)
    write_atomically(FOLDER / f"{name}-mistakes.png", (run / "mistakes.png").read_bytes())
    return path


def shipped_tables() -> tuple[str, str]:
    """Return two tables of the shipped networks, in Markdown: what each one is, and its accuracy by class."""
    lines = ["| name | network | record | epochs | test accuracy | file |", "| --- | --- | --- | --- | --- | --- |"]
    by_class = {}
    for path in sorted(FOLDER.glob("*.pt")):
        network = read_checkpoint(path)
        if "record" not in network:  # a user's own
            continue
        record = read_record(RESULTS / network["record"])
        if not record:
            raise UserError(f"the record of {path}, results/{network['record']}, cannot be read; restore it")
        source = f"[{Path(network['record']).stem}](../results/{network['record']})"
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        cells = [f"`{path.stem}`", network["model"], source, network["epoch"], f"{record['accuracy']:.2f} %", size]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        by_class[f"`{path.stem}`"] = record["per_class"]
    return "\n".join(lines), per_class_table(by_class)
