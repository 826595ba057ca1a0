"""What averages of models on several ranks cost: `python -m benchmarks.sharded [--shapes vit] [--rounds 20] [--write]`.

It starts the ranks itself, as processes of this machine. In each of them two averages take turns, so that what the
machine does besides hits both: that of a sharded model, and that of a plain model which consists of the same parts.
"""

import gc
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import distributed, multiprocessing

from benchmarks import machine, records
from benchmarks.shapes import SHAPES, Shape
from benchmarks.shardings import COMPARISONS, Comparison
from benchmarks.table import Table, digits, mark
from benchmarks.timing import Spread, end_to_end, in_turn, milliseconds, spread
from benchmarks.update import settle_allocator

TIMED = ("vit", "gpt2", "resnet50", "small")
WARM_UPS = 2
MEGABYTE = 1e6


@dataclass(frozen=True)
class Measured:
    """One comparison on one model; times are of all ranks' turns together, bytes those of the rank that has most.

    Attributes:
        time_ratio: of the medians, beside what `most_time` allows.
        bytes_ratio: of the averages' memory, likewise.
    """

    what: str
    shape: str
    ranks: int
    rounds: int
    time: Spread
    other_time: Spread
    time_ratio: float
    most_time: float
    num_bytes: int
    other_num_bytes: int
    bytes_ratio: float
    most_bytes: float


def measured(comparison: Comparison, shape: str, found: Sequence[dict[str, Any]], *, ranks: int) -> Measured:
    """From what each rank found, of one start or of several."""
    own, other = (spread([time for rank in found for time in rank[side]]) for side in ("own", "other"))
    own_bytes, other_bytes = (max(rank[f"{side}_bytes"] for rank in found) for side in ("own", "other"))
    share = 1 / ranks if comparison.divided else 1.0
    return Measured(
        comparison.title,
        shape,
        ranks,
        len(found[0]["own"]) * len(found) // ranks,
        own,
        other,
        own.median / (other.median * share),
        comparison.most_time,
        own_bytes,
        other_bytes,
        own_bytes / (other_bytes * share),
        comparison.most_bytes,
    )


def num_threads(ranks: int) -> int:
    """Those of each rank: the cores of this machine, divided among them."""
    return max(1, (os.cpu_count() or 1) // ranks)


def run_rank(rank: int, ranks: int, jobs: Sequence[tuple[str, str]], rounds: int | None, folder: str) -> None:
    """One rank: it leaves what it finds in a file of its own."""
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    torch.set_num_threads(num_threads(ranks))
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        settle_allocator()
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group("nccl" if on_gpu else "gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    found = [time_both(*named(*job), device, rounds) for job in jobs]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()
    # A thread of the process group that gives back what was sent last, when Python has ended, would abort the process.
    gc.collect()


def named(comparison: str, shape: str) -> tuple[Comparison, Shape]:
    """Rows by their names, which is what processes can be given."""
    return next(c for c in COMPARISONS if c.name == comparison), next(s for s in SHAPES if s.name == shape)


def time_both(comparison: Comparison, shape: Shape, device: torch.device, rounds: int | None) -> dict[str, Any]:
    sides = comparison.build(shape, device)
    clock = milliseconds if device.type == "cpu" else end_to_end

    def together(call: Callable[[], object]) -> float:
        distributed.barrier()
        return clock(call)

    for _ in range(WARM_UPS):
        sides.own.update(), sides.other.update()
    sides.move()
    turns = in_turn(
        {"own": sides.own.update, "other": sides.other.update},
        rounds or shape.rounds,
        num_calls=shape.num_calls,
        timer=together,
    )
    sides.check()
    return {
        **{side: turns[side].time for side in turns},
        "own_bytes": sides.own.report().num_bytes,
        "other_bytes": sides.other.report().num_bytes,
    }


def measure(ranks: int, shapes: Sequence[str], rounds: int | None = None, *, starts: int = 1) -> list[Measured]:
    """Times all comparisons on these models; where memory happens to lie is another matter in each of the starts."""
    jobs = [(comparison.name, shape) for shape in shapes for comparison in COMPARISONS]
    found: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(run_rank, (ranks, jobs, rounds, folder), nprocs=ranks)
            for rank in range(ranks):
                for job, row in enumerate(json.loads((Path(folder) / f"{rank}.json").read_text())):
                    found[job].append(row)
    return [
        measured(comparison, shape.title, rows, ranks=ranks)
        for (comparison, shape), rows in zip((named(*job) for job in jobs), found, strict=True)
    ]


def table(rows: Sequence[Measured]) -> Table:
    return Table(
        title=f"One update on {rows[0].ranks} ranks, median ms, and the averages' memory on a rank, MB",
        columns=("averages", "model", "ms", "quartiles", "other", "ratio", "", "MB", "other", "ratio", ""),
        rows=[
            (
                row.what,
                row.shape,
                digits(row.time.median),
                f"{digits(row.time.lower)} .. {digits(row.time.upper)}",
                digits(row.other_time.median),
                f"{row.time_ratio:.2f}",
                f"{mark(row.time_ratio <= row.most_time)}, <= {row.most_time:g}",
                f"{row.num_bytes / MEGABYTE:.1f}",
                f"{row.other_num_bytes / MEGABYTE:.1f}",
                f"{row.bytes_ratio:.2f}",
                f"{mark(row.bytes_ratio <= row.most_bytes)}, <= {row.most_bytes:g}",
            )
            for row in rows
        ],
        num_text=2,
        note="The two take turns in the same processes, which were started anew several times, and all ranks begin "
        "each update together. A ratio is of the first to the other, or to the N-th part of the other where N ranks "
        "share what the other keeps whole.",
    )


def main(
    ranks: Annotated[int, typer.Option(min=2, help="Processes; with several GPUs at most one each.")] = 4,
    shapes: Annotated[str, typer.Option(help="Some of: small, resnet50, vit, gpt2.")] = "",
    rounds: Annotated[int | None, typer.Option(min=2, help="For every shape, instead of its own number.")] = None,
    starts: Annotated[int, typer.Option(min=1, help="How often to begin with new processes.")] = 3,
    write: Annotated[bool, typer.Option(help="Also write it to benchmarks/results/.")] = False,
) -> None:
    """Time updates of averages on several ranks."""
    if write and shapes:
        raise typer.BadParameter("--write is for whole runs; leave --shapes out")
    num_gpus = torch.cuda.device_count()
    device = "cuda" if num_gpus > 1 else "cpu"
    ranks = min(ranks, num_gpus) if device == "cuda" else ranks
    about = {**machine.describe(device), "ranks": str(ranks)}
    about["threads"] = f"{num_threads(ranks)} a rank"
    found = measure(ranks, shapes.split(",") if shapes else TIMED, rounds, starts=starts)
    shown = table(found)
    console = Console(width=150)
    console.print(shown.rich())
    if write:
        record = {"machine": about, "sharded": [asdict(row) for row in found]}
        text = records.markdown(about, [shown], title="What averages cost on several ranks")
        for path in records.write_files(f"sharded-{device}-{ranks}-ranks", record, text):
            console.print(f"wrote {path.name}")


if __name__ == "__main__":
    typer.run(main)
