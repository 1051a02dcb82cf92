"""Pictures for people: grids of samples, and the loss curve of a run."""

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from einops import rearrange
from jaxtyping import Float, Integer, UInt8

_PALE_TO_DARK = ("#b8cfe5", "#8fb4d6", "#6698c4", "#3f76a6", "#1f4e79")
_MAX_CLASSES = 20  # with names beside their images


def to_picture(image: UInt8[np.ndarray, "h w c"]) -> PIL.Image.Image:
    """A grey (1 channel) or colour (3 channels) image for Pillow."""
    return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(
    images: UInt8[np.ndarray, "n h w c"], labels: Integer[np.ndarray, " n"], names: list[str] | tuple[str, ...]
) -> PIL.Image.Image:
    """Images with white lines between them, near square; small ones enlarged by a whole factor to about 64 pixels.

    Each of 2 to 20 classes is a row, or a block of equal rows, with its name on the left. Images of one class, or of
    more classes, follow each other row by row.
    """
    factor, classes = max(1, 64 // images.shape[1]), list(dict.fromkeys(labels.tolist()))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    if not 1 < len(classes) <= _MAX_CLASSES:
        return to_picture(_tile(images, math.ceil(math.sqrt(len(images)))))
    longest = max(labels.tolist().count(label) for label in classes)
    titles = ["\n".join(textwrap.wrap(names[label].split(",")[0], 20, max_lines=3)) for label in classes]
    font = PIL.ImageFont.load_default(14)
    margin = 12 + math.ceil(max(font.getlength(line) for title in titles for line in title.split("\n")))

    def block_size(columns: int) -> tuple[int, int]:  # with a wider gap below blocks of several rows
        rows = math.ceil(longest / columns)
        return margin + (images.shape[2] + 2) * columns - 2, (images.shape[1] + 2) * rows + 6 * (rows > 1)

    def size(layout: tuple[int, int]) -> tuple[int, int]:
        (width, height), across = block_size(layout[0]), layout[1]
        return across * width, math.ceil(len(classes) / across) * height - 2

    rows = [n for n in range(1, longest + 1) if longest % n == 0 or n * n <= longest < (n + 1) ** 2]
    layouts = [(math.ceil(longest / n), across) for n in rows for across in range(1, len(classes) + 1)]
    columns, across = layout = min(layouts, key=lambda layout: max(size(layout)))
    blocks = [to_picture(_tile(images[labels == label], columns)) for label in classes]
    (width, height), picture = block_size(columns), PIL.Image.new(blocks[0].mode, size(layout), "white")
    for number, (title, block) in enumerate(zip(titles, blocks, strict=True)):
        x, y = number % across * width + margin, number // across * height
        picture.paste(block, (x, y))
        middle = (x - 5, y + block.height // 2)
        PIL.ImageDraw.Draw(picture).text(middle, title, fill="black", font=font, anchor="rm", align="right")
    return picture


def _tile(images: UInt8[np.ndarray, "n h w c"], columns: int) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Images row by row, with white lines between them and white for missing ones."""
    missing = -len(images) % columns
    padded = np.pad(images, ((0, missing), (0, 2), (0, 2), (0, 0)), constant_values=255)
    padded[len(images) :] = 255
    return rearrange(padded, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)[:-2, :-2]


def write_loss_curve(
    file: Path,
    steps: Float[np.ndarray, " n"],
    losses: Float[np.ndarray, " n"],
    losses_by_time: Float[np.ndarray, "n bins"],
    counts_by_time: Float[np.ndarray, "n bins"],
) -> None:
    """Plot the loss over training, raw and smoothed, and the loss by time in five parts of the run.

    Times without examples have a loss of NaN and a count of 0. Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    over_training, by_time = figure.subplots(1, 2)
    window = max(1, len(losses) // 50)
    over_training.plot(steps, losses, color="#b8cfe5" if window > 1 else "#1f4e79", linewidth=1, label="raw")
    if window > 1:
        means = np.convolve(losses, np.ones(window) / window, "valid")
        over_training.plot(steps[window - 1 :], means, color="#1f4e79", label=f"mean of {window}")
    times, curves = 1000 * (np.arange(losses_by_time.shape[1]) + 0.5) / losses_by_time.shape[1], []
    for part, color in zip(np.array_split(np.arange(len(losses)), 5), _PALE_TO_DARK, strict=True):
        counts = counts_by_time[part].sum(0)
        sums = np.nansum(losses_by_time[part] * counts_by_time[part], 0)
        curves.append(np.divide(sums, counts, out=np.full(len(times), np.nan), where=counts > 0))
        label = f"to step {steps[part[-1]]:,.0f}" if len(part) else None
        by_time.plot(times, curves[-1], color=color, label=label)
    over_training.set(xlabel="training step", ylabel="training loss")
    by_time.set(xlabel="time, from data (0) to noise (1000)")
    over_training.xaxis.set_major_formatter("{x:,.0f}")
    for axes, values in ((over_training, losses), (by_time, np.array(curves))):
        _log_axis(axes, values)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(file)


def _log_axis(axes: Any, values: Float[np.ndarray, "..."]) -> None:
    """A logarithmic vertical axis with ticks at round values."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    positive = values[values > 0]
    wide = positive.size and positive.max() > 10 * positive.min()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
