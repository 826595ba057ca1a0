"""The two pictures of digits.py."""

from collections.abc import Sequence
from pathlib import Path

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

RAW_COLOUR = "#777777"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # told apart by colour-blind eyes too


def plot_curves(path: Path, errors: dict[str, numpy.ndarray]) -> None:
    """Test error after every epoch; each value of `errors` is an array of shape (seeds, epochs), in percent."""
    figure, axes = new_figure()
    for (name, values), colour in zip(errors.items(), [RAW_COLOUR, *COLOURS], strict=False):
        epochs = numpy.arange(1, values.shape[1] + 1)
        label = f"{name}: {values[:, -1].mean():.2f} %"
        values = values.clip(min=0.1)  # an error of 0 % has no place on a logarithmic axis
        axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(epochs, values.mean(axis=0), color=colour, marker="o", markersize=3, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("epoch")
    num_seeds = len(next(iter(errors.values())))
    shading = f": mean of {num_seeds} seeds, shaded from the best to the worst" if num_seeds > 1 else ""
    axes.set_title(f"Test error{shading}", loc="left")
    save(figure, axes, path, legend_title="after the last epoch")


def plot_profiles(path: Path, weights: dict[str, Sequence[float]], steps_per_epoch: int) -> None:
    """How much of each step's weights is in the averages at the end of the run."""
    figure, axes = new_figure()
    for (name, values), colour in zip(weights.items(), COLOURS, strict=False):
        epochs = numpy.arange(1, len(values) + 1) / steps_per_epoch
        percent = 100 * numpy.asarray(values)
        initial = 100 - percent.sum()
        label = f"{name}\n({initial:.0f} % are still the initial weights)" if initial >= 0.5 else name
        axes.plot(epochs, percent, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("epochs trained when the weights were taken in")
    axes.set_title("What each average is made of at the end: the share of every step's weights", loc="left")
    save(figure, axes, path)


def new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, axes: Axes, path: Path, legend_title: str | None = None) -> None:
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(title=legend_title, alignment="left", frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=150)
