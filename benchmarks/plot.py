"""Draws the curves of an update's time, with the limit."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.scaling import Curve

MARKERS = "osv^Dd<>P"
OURS = "polyak"


def draw(curves: Sequence[Curve], path: Path, *, about: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(6 * len(curves), 5.6), sharey=True, squeeze=False)
    for axis, curve in zip(axes[0], curves, strict=True):
        markers = iter(MARKERS)
        for name, times in curve.milliseconds.items():
            if name == curve.limit:
                axis.plot(curve.sizes, times, color="black", linestyle="--", linewidth=1.5, label=f"limit: {name}")
            else:
                first = name.startswith(OURS)
                axis.plot(
                    curve.sizes,
                    times,
                    marker=next(markers),
                    markersize=5,
                    linewidth=2.5 if first else 1.2,
                    zorder=3 if first else 2,
                    label=name,
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(f"number of {curve.title}")
        axis.grid(which="major", alpha=0.4)
        axis.grid(which="minor", alpha=0.12)
        axis.tick_params(labelleft=True)
    axes[0][0].set_ylabel("one update, median ms")
    figure.suptitle(f"One update in float32: {about}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
