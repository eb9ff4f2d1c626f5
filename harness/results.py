"""The records of finished runs: reading, summarising and comparing them, and tables for the README and terminal."""

import functools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from harness.recipe import first_difference
from harness.statistics import Difference, difference, interval
from harness.terminal import UserError

RESULTS = Path(__file__).resolve().parent.parent / "results"
Machines = dict[str, dict[str, list[dict]]]  # the records by machine, then by row, one for each seed


def read_records(own_folder: Path | None = None) -> Machines:
    """Return the records by machine, then by row, one for each seed.

    A machine is a folder of results/ or `own_folder`.
    """
    folders = [path for path in sorted(RESULTS.iterdir()) if path.is_dir() and not path.name.startswith("mine")]
    if own_folder and own_folder.resolve() not in folders:
        folders.append(own_folder)
    return {folder.name if folder.parent == RESULTS else str(folder): read_folder(folder) for folder in folders}


def read_folder(folder: Path) -> dict[str, list[dict]]:
    """Return the records in a folder by row, one for each seed."""
    rows = {}
    for path in sorted(folder.glob("*-seed*.json")):
        if record := read_record(path):
            rows.setdefault(path.stem.rpartition("-seed")[0], []).append(record)
    return rows


@functools.cache
def read_record(path: Path) -> dict | None:
    """Return the record of a run.

    If the file is not a record, as after a merge with conflicts, print a line and return None.
    """
    try:
        record = json.loads(path.read_text())
        figures = [record[key] for key in ("accuracy", "best_accuracy", "seconds")]
        figures += [row[key] for row in record["epochs"] for key in ("epoch", "seconds")]
        figures += [*record["per_class"].values(), *map(sum, record["confusion"])]
        texts = (record["device"], record["precision"], record["recipe"]["data"])
        if record["epochs"] and all(isinstance(value, int | float) for value in figures) and "".join(texts):
            return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    report_unreadable(path)
    return None


@functools.cache  # once for each path
def report_unreadable(path: Path) -> None:
    """Print that the file is skipped."""
    print(f"{path} is not a record of a run; skipped", flush=True)


def training_seconds(record: dict) -> float:
    """Return a run's time: its median epoch times the number of epochs, so that other work beside it does not count."""
    return statistics.median(row["seconds"] for row in record["epochs"]) * len(record["epochs"])


def duration(seconds: float) -> str:
    """Return a duration as text, in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def check_same_recipe(one: dict, other: dict) -> None:
    """Raise UserError if two records are of different recipes, whose accuracies have no common mean."""
    recipes = [record["recipe"] | {"epochs": len(record["epochs"])} for record in (one, other)]
    if all(recipe.get("constants") for recipe in recipes):  # which early records lack
        # A constant that only one version of the script has is not compared. Most lead to settings, which are.
        shared = recipes[0]["constants"].keys() & recipes[1]["constants"].keys()
        for recipe in recipes:
            recipe["constants"] = {name: recipe["constants"][name] for name in shared}
    if differing := first_difference(recipes[1], recipes[0], {"seed", "--seed"}):
        seeds = " and ".join(str(recipe.get("seed", recipe.get("--seed"))) for recipe in reversed(recipes))
        raise UserError(
            f"the records of {one['run']} and its other seeds have no common mean: one has {differing} "
            f"(seeds {seeds}); move one kind into another folder"
        )


def summary(records: list[dict]) -> str:
    """Return the accuracy of a row's records in percent, as text.

    For several seeds it is the mean, the standard deviation, n and, in brackets, the mean's 95 % confidence interval.
    Raises UserError if the records are of different recipes.
    """
    for record in records[1:]:
        check_same_recipe(records[0], record)
    values = [record["accuracy"] for record in records]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    low, high = interval(values)
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.1f} ± {deviation:.1f} (n = {len(values)}) [{low:.2f}, {high:.2f}]"


def accuracy_table(targets: dict[str, float], machines: Machines) -> str:
    """Return a table for the terminal: the last epoch's accuracy in percent on each machine.

    targets: the target of each row in percent, by the row's name. If a row's records have no common mean, a line below
    the table says why.
    """
    lines, errors = [["row", "target", *machines]], []
    for name, target in targets.items():
        lines.append([name, f"{target:g}"])
        for rows in machines.values():
            try:
                lines[-1].append(summary(rows.get(name, [])) or "-")
            except UserError as error:
                lines[-1].append("no mean")
                errors.append(str(error))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines] + errors)


def compare(one: str, other: str, names: Iterable[str], own_folder: Path) -> str:
    """Return how `other` compares with `one`: two rows, or two folders of results with rows of these names.

    Raises UserError if no row can be compared.
    """
    lines, errors = [], []
    if one in names and other in names:
        rows, where = read_folder(own_folder), f" in {own_folder}"
        groups = [(f"{one} -> {other}", rows.get(one, []), rows.get(other, []))]
    else:
        folders = [RESULTS / name if (RESULTS / name).is_dir() else Path(name) for name in (one, other)]
        (before, after), where = map(read_folder, folders), ""
        groups = [(name, before[name], after[name]) for name in names if name in before and name in after]
    if not groups:
        raise UserError(
            f"--compare {one} {other}: neither two of --only's rows nor two folders with records of the same row"
        )
    for name, *pair in groups:
        try:
            if min(map(len, pair)) < 2:
                raise UserError(
                    f"{name}: {len(pair[0])} and {len(pair[1])} records{where}; a comparison needs two seeds each"
                )
            # Fingerprints may differ, because the archive and class folders have CIFAR-10's images in different orders.
            if len({record.get("data") == "synthetic" for records in pair for record in records}) > 1:
                raise UserError(f"{name}: only one has records of the synthetic images; compare the same images")
            values = [[record["accuracy"] for record in records] for records in pair]
            lines.append(f"{name}: {summary(pair[0])}, {summary(pair[1])}; {verdict(difference(*values))}")
        except UserError as error:
            errors.append(str(error))
    if not lines:
        raise UserError("; ".join(errors))
    return "\n".join(lines + errors)


def verdict(found: Difference) -> str:
    """Return a sentence on how the second of two compares with the first."""
    told = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]: the second is "
    if found.low > 0 or found.high < 0:
        return told + ("better" if found.mean > 0 else "worse")
    needed = (
        f"about {found.seeds:.0f} seeds each would mostly show"
        if found.seeds < 1e6
        else "no number of seeds would show"
    )
    return told + f"not distinguishable from the first with this many seeds; {needed} a difference of this size"


def results_table(rows, machines: Machines) -> str:
    """Return the README's table of results, in Markdown. rows: reproduce.py's, by name, with command and target."""
    lines = [
        "| command | target | last epoch | best epoch | epochs | time | machine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        start = f"| `python {row.command}` | {row.target:g} |"
        found = [records[name] for records in machines.values() if name in records]
        for records in found:
            seconds = statistics.mean(map(training_seconds, records))
            machine = ", ".join(dict.fromkeys(f"{record['device']}, {record['precision']}" for record in records))
            accuracy, best = summary(records), statistics.mean(record["best_accuracy"] for record in records)
            first, last = (records[0]["epochs"][i]["epoch"] for i in (0, -1))
            epochs = last if first == 1 else f"{first} to {last}"
            lines.append(f"{start} {accuracy} | {best:.1f} | {epochs} | {duration(seconds)} | {machine} |")
        if not found:
            lines.append(f"{start} not run yet | | | | |")
    return "\n".join(lines)


def by_class_table(targets: dict[str, float], machines: Machines) -> str:
    """Return the table of r3's accuracy by class, in Markdown."""
    found = {machine: rows["r3"][0]["per_class"] for machine, rows in machines.items() if "r3" in rows}
    return per_class_table({"target": targets} | found)


def per_class_table(accuracies: dict[str, dict[str, float]]) -> str:
    """Return a table in Markdown of accuracies by class, in percent: a line for each name."""
    classes = next(iter(accuracies.values()), {})
    lines = ["| | " + " | ".join(classes) + " |", "| --- |" + " --- |" * len(classes)]
    for name, values in accuracies.items():
        lines.append(f"| {name} | " + " | ".join(f"{values[c]:.1f}" for c in classes) + " |")
    return "\n".join(lines)
