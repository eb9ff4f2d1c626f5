"""The tables and pictures of README and docs, made from the records in results/."""

import math
from pathlib import Path

import torch

from harness import drawing
from harness.files import write_atomically
from harness.results import RESULTS, Machines, by_class_table, read_records, results_table
from harness.shipped import shipped_tables
from harness.terminal import UserError

ROOT = RESULTS.parent
# r3's accuracy by class in the notes that these scripts grew from
R3_BY_CLASS = {
    "airplane": 86.2, "automobile": 91.3, "bird": 76.3, "cat": 59.7, "deer": 85.4,
    "dog": 80.2, "frog": 89.3, "horse": 87.1, "ship": 91.6, "truck": 91.5,
}  # fmt: skip


def fill(text: str, tables: dict[str, str]) -> str:
    """Return the text with its tables rewritten, each between two comments. Raise UserError if these are missing."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: written by reproduce.py --readme -->\n\n", f"\n\n<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, found_too, after = rest.partition(end)
        if not (found and found_too):
            raise UserError(f"there is no place for the table {name!r}; put its two comments back")
        text = before + begin + table + end + after
    return text


def filled_pages(rows, machines: Machines) -> dict[Path, str]:
    """Return the pages with their tables rewritten, by path. Raise UserError if a table has no place."""
    networks, networks_by_class = shipped_tables()
    tables = {
        ROOT / "README.md": {"results": results_table(rows, machines)},
        ROOT / "checkpoints/README.md": {"networks": networks, "networks by class": networks_by_class},
        ROOT / "docs/results.md": {"r3 by class": by_class_table(R3_BY_CLASS, machines)},
        ROOT / "docs/speed.md": {name: measured(name) for name in ("throughput", "alternatives")},
    }
    return {path: fill(path.read_text(encoding="utf-8"), own) for path, own in tables.items()}


def measured(name: str) -> str:
    """Return a benchmark's output on each machine: its Markdown file in each folder of results/."""
    texts = [path.read_text(encoding="utf-8").strip() for path in sorted(RESULTS.glob(f"*/{name}.md"))]
    return "\n\n".join(texts) or "Not measured yet."


def write_pages(rows) -> None:
    """Write the tables of README and docs, and each machine's pictures into its folder of results/.

    rows: reproduce.py's, by name.
    """
    machines = read_records()
    for path, text in filled_pages(rows, machines).items():
        write_atomically(path, text.encode())
    for machine, records in machines.items():
        own = {name: records[name] for name in rows if name in records}
        if own:
            draw_pictures(rows, own, RESULTS / machine)


def draw_pictures(rows, records: dict[str, list[dict]], folder: Path) -> None:
    """Draw a machine's curves, costs, seeds and its best row's confusion matrix into its folder.

    rows: reproduce.py's; records: the machine's, in the order of `rows`.
    """
    first = {name: seeds[0] for name, seeds in records.items()}
    # A row with -long differs from the usual row in --epochs only. It is drawn only in its absence.
    shown = [name for name in first if not name.endswith("-long") or name.removesuffix("-long") not in first]
    logs, operations = {}, {}
    for name in shown:
        parts = [first[part] for part in (rows[name].after, name) if part in first]
        logs[name] = [epoch for part in parts for epoch in part["epochs"]]
        operations[name] = sum(part["petaflop"] or math.nan for part in parts)
    drawing.curves({name: first[name]["epochs"] for name in shown}, folder / "curves.png")
    drawing.costs(logs, operations, folder / "costs.png")
    accuracies = {name: [record["accuracy"] for record in seeds] for name, seeds in records.items()}
    drawing.seeds(accuracies, folder / "seeds.png")
    best = max(first, key=lambda name: first[name]["accuracy"])  # the one with the fewest mistakes
    confusion, classes = torch.tensor(first[best]["confusion"]), [*first[best]["per_class"]]
    drawing.confusion(confusion, classes, best, folder / "confusion.png")
