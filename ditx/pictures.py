"""Pictures for people: grids of samples and the curve of a loss."""

import math

import numpy as np
import PIL.Image
import PIL.ImageDraw
from einops import rearrange
from jaxtyping import Float, UInt8


def to_picture(image: UInt8[np.ndarray, "h w c"]) -> PIL.Image.Image:
    """A grey (1 channel) or colour (3 channels) image for Pillow."""
    return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int) -> PIL.Image.Image:
    """Images row by row with white lines between them, small ones enlarged by a whole factor to about 64 pixels."""
    missing = -len(images) % columns
    padded = np.pad(images, ((0, missing), (0, 2), (0, 2), (0, 0)), constant_values=255)
    tiled = rearrange(padded, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)[:-2, :-2]
    picture, factor = to_picture(tiled), max(1, 64 // images.shape[1])
    return picture.resize((picture.width * factor, picture.height * factor), PIL.Image.Resampling.NEAREST)


def loss_curve(steps: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"]) -> PIL.Image.Image:
    """The loss over training: each value, and their running mean over a fiftieth of the run.

    The vertical axis is cut at the 98th percentile, since the first steps lie far above all others.
    """
    metric_sums = max(1, math.ceil(len(losses) / 50))
    sums = np.cumsum(np.concatenate([np.zeros(1), losses]))
    starts = np.maximum(np.arange(len(losses)) + 1 - metric_sums, 0)
    means = (sums[1:] - sums[starts]) / (np.arange(len(losses)) + 1 - starts)
    span = max(float(steps[-1]), 1.0) if len(steps) else 1.0
    curves = [(losses, "#b8cfe5", 1), (means, "#1f4e79", 3)]
    return _curves(steps, curves, span, "training loss", "training step")


def loss_by_time(losses: Float[np.ndarray, "n bins"], counts: Float[np.ndarray, "n bins"]) -> PIL.Image.Image:
    """The mean loss at each range of time, data first, in five parts of a run, from pale to dark."""
    curves = []
    for k, part in enumerate(np.array_split(np.arange(len(losses)), 5)):
        total = np.nansum(losses[part] * counts[part], 0)
        means = np.divide(total, counts[part].sum(0), out=np.full(len(total), np.nan), where=counts[part].sum(0) > 0)
        curves.append((means, ("#dbe7f2", "#b8cfe5", "#7fa6cc", "#4878a6", "#1f4e79")[k], 3))
    times = 1000 * (np.arange(losses.shape[1]) + 0.5) / losses.shape[1]
    title = "training loss by time, early (pale) to late (dark)"
    return _curves(times, curves, 1000.0, title, "time, from data to noise")


def _curves(
    across: np.ndarray, curves: list[tuple[np.ndarray, str, int]], span: float, title: str, below: str
) -> PIL.Image.Image:
    """Values by their places from 0 to `span`, each with colour and thickness."""
    width, height, left, bottom, top, right = 800, 450, 70, 40, 30, 20
    picture = PIL.Image.new("RGB", (width, height), "white")
    draw = PIL.ImageDraw.Draw(picture)
    sync_errors = np.concatenate([values for values, _, _ in curves])
    finite = sync_errors[np.isfinite(sync_errors)]
    low, high = (finite.min(), np.percentile(finite, 98)) if finite.size else (0.0, 1.0)
    high = high if high > low else low + 1

    def at(place, value):
        x = left + (width - left - right) * place / span
        y = height - bottom - (height - bottom - top) * (min(value, high) - low) / (high - low)
        return x, y

    for fraction in np.linspace(0, 1, 6):
        x, y = at(fraction * span, low + fraction * (high - low))
        draw.line([(left, y), (width - right, y)], fill="#dddddd")
        draw.text((left - 8, y), f"{low + fraction * (high - low):.4g}", fill="black", anchor="rm")
        draw.text((x, height - bottom + 8), f"{fraction * span:,.0f}", fill="black", anchor="mt")
    draw.text((width / 2, height - 4), below, fill="black", anchor="mb")
    draw.text((left, 8), title, fill="black", anchor="lt")
    for values, colour, thickness in curves:
        points = [at(place, value) for place, value in zip(across, values, strict=True) if np.isfinite(value)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=thickness)
    return picture
