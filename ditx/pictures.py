"""Pictures for people: grids of samples, and the loss curve of a run."""

from pathlib import Path

import numpy as np
import PIL.Image
from einops import rearrange
from jaxtyping import Float, UInt8

_PALE_TO_DARK = ("#dbe7f2", "#b8cfe5", "#7fa6cc", "#4878a6", "#1f4e79")


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


def write_loss_curve(
    file: Path,
    steps: Float[np.ndarray, " n"],
    losses: Float[np.ndarray, " n"],
    losses_by_time: Float[np.ndarray, "n bins"],
    counts_by_time: Float[np.ndarray, "n bins"],
) -> None:
    """Plot the loss over training and, in five parts of the run from early (pale) to late (dark), by time.

    Times without examples have a loss of NaN and a count of 0. Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    over_training, by_time = figure.subplots(1, 2)
    window = max(1, len(losses) // 50)
    over_training.plot(steps, losses, color="#b8cfe5", linewidth=1)
    if len(losses) >= window:
        means = np.convolve(losses, np.ones(window) / window, "valid")
        over_training.plot(steps[window - 1 :], means, color="#1f4e79")
    times = 1000 * (np.arange(losses_by_time.shape[1]) + 0.5) / losses_by_time.shape[1]
    for part, color in zip(np.array_split(np.arange(len(losses)), 5), _PALE_TO_DARK, strict=True):
        counts = counts_by_time[part].sum(0)
        sums = np.nansum(losses_by_time[part] * counts_by_time[part], 0)
        by_time.plot(times, np.divide(sums, counts, out=np.full(len(times), np.nan), where=counts > 0), color=color)
    over_training.set(yscale="log", xlabel="training step", ylabel="training loss")
    by_time.set(yscale="log", xlabel="time, from data to noise", title="early (pale) to late (dark)")
    figure.savefig(file)
