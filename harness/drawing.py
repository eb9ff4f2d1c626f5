"""Pictures of runs, of predictions and of several seeds, drawn with matplotlib."""

import argparse
import io
import math
import statistics
import warnings
from itertools import cycle, product
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure  # without pyplot there is no window and no state between two pictures
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from PIL import Image

from harness.data import Data, as_seen
from harness.files import write_atomically
from harness.records import read_log
from harness.statistics import interval
from harness.terminal import UserError, escape_unprintable, nonempty_path

own_settings = matplotlib.rc_context({"text.parse_math": False})  # a class's name may hold a $

# Colours that colour-blind readers can tell apart: Okabe and Ito's, with a brown for their yellow, which is too pale,
# and three of Tol's.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#8c510a")
COLORS += ("#332288", "#882255", "#ddcc77")


def draw_run(folder: Path, logits: torch.Tensor, matrix: torch.Tensor, data: Data) -> None:
    """Draw curves.png, confusion.png and mistakes.png of a run into its folder. Raise UserError if that fails.

    logits: of the test images, of shape (N, classes), as `utils.predict` returns them; matrix: their
    `utils.confusion_matrix`.
    """
    rows, name = read_log(folder), folder.resolve().name
    classes = [*map(escape_unprintable, data.classes)]
    title = f"{escape_unprintable(name)}, after epoch {rows[-1]['epoch']:.0f}, {data.tested_on} images"
    curves({name: rows}, folder / "curves.png")
    confusion(matrix, classes, title, folder / "confusion.png")
    mistakes(data.test_images, data.test_labels, logits, classes, title, folder / "mistakes.png")
    print(f"curves.png, confusion.png and mistakes.png are in {folder}")


@own_settings
def curves(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw accuracy, loss and learning rate by epoch. logs: the rows of each run's log, by the run's name."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for (name, rows), color in zip(logs.items(), cycle(COLORS), strict=False):
        column = {key: [row[key] for row in rows] for key in rows[0]}
        style = {"color": color, "marker": "." if len(rows) < (40 if len(logs) == 1 else 3) else ""}
        for axis, what in zip(axes, ("accuracy", "loss"), strict=False):
            axis.plot(column["epoch"], column[f"test_{what}"], **style)
            axis.plot(column["epoch"], column[f"train_{what}"], ":", **style, linewidth=1, markersize=3)
        axes[2].plot(column["epoch"], column["lr"], **style, label=escape_unprintable(name))
    axes[0].set(title="accuracy in percent", xlabel="epoch")
    axes[1].set(title="loss", xlabel="epoch", ylim=(0, None))
    axes[2].set(title="learning rate", xlabel="epoch")
    if len(logs) == 1:
        axes[2].set_ylim(bottom=0)
    else:  # the rates of different optimizers differ by orders of magnitude
        axes[2].set_yscale("log")
        axes[2].yaxis.set_major_formatter("{x:g}")
        axes[2].yaxis.set_minor_formatter("")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    lines = [Line2D([], [], color="#555555"), Line2D([], [], color="#555555", linestyle=":")]
    axes[1].legend(lines, ["test", "training"], frameon=False)
    columns = 130 // (max(map(len, logs)) + 8)  # the figure is 130 characters wide, and a line takes 8 beside its name
    figure.legend(loc="outside upper left", ncols=max(1, min(6, columns)), frameon=False)
    save(figure, path)


@own_settings
def confusion(matrix: torch.Tensor, classes: list[str], title: str, path: Path) -> None:
    """Draw a `utils.confusion_matrix` in percent of each row. The diagonal holds the accuracy of each class."""
    percent = (100 * matrix / matrix.sum(1, keepdim=True)).numpy()
    mistaken = np.ma.masked_array(percent, mask=np.eye(len(classes), dtype=bool))
    side = min(max(6.5, 0.5 * len(classes)), 25)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(mistaken, cmap="Oranges", vmin=0, vmax=max(mistaken.max(), 1))  # the diagonal would hide these
    ticks = range(len(classes))
    axis.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(ticks, classes)
    axis.set(xlabel="predicted as", ylabel="true class", title=f"{title}\npercent of each class's images")
    for i, j in np.ndindex(percent.shape) if len(classes) <= 20 else ():
        if i == j:
            axis.text(j, i, f"{percent[i, j]:.1f}", ha="center", va="center", weight="bold")
        elif matrix[i, j]:
            color = "white" if percent[i, j] > 0.6 * mistaken.max() else "black"
            axis.text(j, i, f"{percent[i, j]:.1f}", ha="center", va="center", color=color, size=9)
    save(figure, path)


@own_settings
def mistakes(
    images: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor, classes: list[str], title: str, path: Path
) -> None:
    """Draw the 20 most confident mistakes, or fewer. images: uint8 of shape (N, 3, 32, 32)."""
    confidence, predictions = logits.softmax(1).max(1)
    wrong = (predictions != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    lines = max(1, min(4, math.ceil(len(wrong) / 5)))
    figure = Figure(figsize=(8, 0.5 + 2 * lines), layout="constrained")
    figure.suptitle(f"{title}\n{len(wrong)} of {len(labels)} images wrong, the most confident mistakes first")
    axes = figure.subplots(lines, 5).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, i in zip(axes, wrong.tolist(), strict=False):
        axis.imshow(images[i].permute(1, 2, 0).numpy())
        predicted = classes[predictions[i]]
        axis.set_title(f"{cut(predicted)} {100 * confidence[i]:.1f} %\nis {cut(classes[labels[i]])}", size=10)
    save(figure, path)


def cut(text: str, length: int = 10) -> str:
    """Return a text as it fits above a small picture, of up to `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


@own_settings
def pictures(predictions: list[tuple[str, dict[str, float]]], path: Path) -> int:
    """Draw the first 40 pictures, each with its name and its classes. Return how many are drawn.

    predictions: of each picture its path, and its probabilities by class.
    """
    shown = predictions[:40]
    columns = min(5, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, (name, probabilities) in zip(axes, shown, strict=False):
        with warnings.catch_warnings(action="ignore"), Image.open(name) as image:  # Pillow's advice
            image = as_seen(image)
            image.thumbnail((200, 200))
            axis.imshow(np.asarray(image))
        axis.axis("on")
        axis.set_xticks([])
        axis.set_yticks([])
        lines = [cut(Path(name).name, 20), *(f"{cut(each)} {100 * p:.1f} %" for each, p in probabilities.items())]
        axis.set_title("\n".join(map(escape_unprintable, lines)), size=9)
    save(figure, path)
    return len(shown)


@own_settings
def seeds(accuracies: dict[str, list[float]], path: Path) -> None:
    """Draw each run's accuracy in percent as a dot, by row, with the mean and its 95 % confidence interval.

    The row with the lowest mean comes first.
    """
    accuracies = dict(sorted(accuracies.items(), key=lambda row: statistics.mean(row[1])))
    figure = Figure(figsize=(8, 0.9 + 0.6 * len(accuracies)), layout="constrained")
    axis = figure.subplots()
    for line, values in enumerate(accuracies.values()):
        heights = [line + 0.12 * (i % 5 - 2) for i in range(len(values))]  # spread out, so that equal values are seen
        axis.plot(values, heights, "o", color=COLORS[0], alpha=0.5, markersize=4)
        mean = statistics.mean(values)
        low, high = interval(values) if len(values) > 1 else (mean, mean)
        axis.errorbar(mean, line, xerr=[[mean - low], [high - mean]], fmt="|", color="black", capsize=5, markersize=16)
        label = f"{mean:.2f}, n = {len(values)}"
        axis.text(mean, line + 0.32, label, ha="center", va="top", size=9)
    axis.set_yticks(range(len(accuracies)), [*map(escape_unprintable, accuracies)])
    axis.set(xlabel="accuracy of the last epoch's network in percent: each run, the mean and its 95 % interval")
    axis.set_ylim(len(accuracies) - 0.4, -0.6)
    axis.margins(x=0.1)  # for the means' labels
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)


@own_settings
def costs(logs: dict[str, list[dict[str, float]]], petaflop: dict[str, float], path: Path) -> None:
    """Draw the test accuracy in percent over the minutes and over the operations that a run has taken so far.

    Each epoch takes the median epoch's time, so that work beside the run does not count.
    logs: the rows of each run's log, by the run's name. petaflop: all operations of a run, in 10^15, by its name.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    ends = {axis: [] for axis in axes}
    for (name, rows), color in zip(logs.items(), cycle(COLORS), strict=False):
        accuracy = [row["test_accuracy"] for row in rows]
        epochs = np.arange(1, len(rows) + 1)
        minutes = np.median([row["seconds"] for row in rows]) * epochs / 60
        operations = petaflop[name] * epochs / len(rows)
        for axis, cost in zip(axes, (minutes, operations), strict=True):
            axis.plot(cost, accuracy, color=color, linewidth=1, alpha=0.4)
            axis.plot(cost[-1], accuracy[-1], "o", color=color, markersize=5)
            ends[axis].append((accuracy[-1], cost[-1], f"{escape_unprintable(name)} {accuracy[-1]:.1f}", color))
    titles = ("minutes of training and testing", "operations of training, in PFLOP")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", xlabel=title, ylim=(50, 102))  # room for the labels of the highest dots
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on the test images, in percent")
    figure.draw_without_rendering()  # now it is known where everything lies
    for axis in axes:
        label_dots(axis, sorted(ends[axis]))
    save(figure, path)


def label_dots(axis: Axes, dots: list[tuple[float, float, str, str]]) -> None:
    """Write each label above or below its dot, as near as possible without covering a dot or another label.

    dots: of each dot its height, its place on the x-axis, its label and its colour.
    """
    centres = axis.transData.transform([(x, y) for y, x, *_ in dots])
    taken = [Bbox.from_extents(*(centre - 4), *(centre + 4)) for centre in centres if np.isfinite(centre).all()]
    halo = [withStroke(linewidth=2, foreground="white")]
    style = {"textcoords": "offset points", "size": 8, "weight": "bold", "path_effects": halo, "in_layout": False}
    for y, x, text, color in dots:
        for points, above, side in product(range(4, 100, 2), (True, False), ("right", "left")):
            place = (0, points if above else -points)
            label = axis.annotate(text, (x, y), place, ha=side, va="bottom" if above else "top", color=color, **style)
            box = label.get_window_extent()
            if not any(map(box.overlaps, taken)) and axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1:
                taken.append(box)
                break
            label.remove()


def save(figure: Figure, path: Path) -> None:
    """Write the picture atomically, in the format of the path's suffix. Raise UserError if it cannot be written."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class's name may have letters that the font lacks
        try:
            figure.savefig(content, dpi=120, format=path.suffix.removeprefix(".").lower())
        except Exception as error:  # .pgf needs LaTeX, for example
            reason = " ".join(str(error).split()[:20])
            raise UserError(f"{path} cannot be drawn ({reason}); use another suffix, such as .png") from None
    write_atomically(path, content.getbuffer())


def picture_path(name: str) -> Path:
    """Return the path of a picture named on a command line."""
    path = nonempty_path(name)
    if path.suffix.removeprefix(".").lower() not in FigureCanvasBase.filetypes:
        raise argparse.ArgumentTypeError(f"{name!r} has no picture suffix, such as .png or .svg")
    return path
