"""What averages of large models take, and where: `python -m benchmarks.sizing [--write]`, which is for the docs.

Bytes are formulas. Times are bytes over rates that were measured, and are left out where none was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.pages import write_text
from benchmarks.rates import PCIE, Machine, machines, update_rate
from benchmarks.suites import COMPENSATED, FLOAT32, MIXED, STOCHASTIC, Suite
from benchmarks.table import Table, digits
from polyak.store.updates.host import NUM_SETS

PAGE = Path(__file__).parent.parent / "docs" / "choosing.md"
MARK = "sizing"

MODES = (MIXED, FLOAT32, STOCHASTIC, COMPENSATED)
EVERY = (1, 10, 100)
RANKS_OF_A_NODE = 8
BILLION = 1e9
GIGABYTE = 1e9
# What takes the time of an update, in the order of `Place.seconds`.
WAYS = ("GPU", "PCIe", "CPU")


@dataclass(frozen=True)
class Layout:
    """A model on its ranks.

    Attributes:
        model: what it is, and on how many GPUs.
        how: what spreads it, and the dtype of its parameters.
        here: how many parameters a rank has.
        replicas: how many ranks have the same ones; `shard_over` divides averages among them.
        suite: the dtypes of parameters and averages.
    """

    model: str
    how: str
    here: float
    replicas: int
    suite: Suite


# DeepSeek-V3's: 58 layers of 256 experts, of three matrices of 7168 x 2048 each.
EXPERTS = 58 * 256 * 3 * 7168 * 2048
REST = 671 * BILLION - EXPERTS

LAYOUTS = (
    Layout("7B on 8", "FSDP2 over 8, float32", 7 * BILLION / 8, 1, FLOAT32),
    Layout("7B on 8", "DDP with ZeRO-1, bfloat16", 7 * BILLION, 8, MIXED),
    Layout("70B on 64", "FSDP2 over 64, float32", 70 * BILLION / 64, 1, FLOAT32),
    Layout("70B on 64", "HSDP 8 x 8, bfloat16", 70 * BILLION / 8, 8, MIXED),
    Layout("671B MoE on 2048", "experts over 64, FSDP2 over 32, bfloat16", 671 * BILLION / 64 / 32, 1, MIXED),
    Layout("671B MoE on 2048", "16 stages, experts over 64, bfloat16", EXPERTS / 16 / 64 + REST / 16, 2, MIXED),
)


@dataclass(frozen=True)
class Place:
    """Where the averages of a layout are, and what they take there; bytes on the host are those of a node.

    Attributes:
        layout: what is averaged.
        on_host: whether they are in the host's memory, and not in the GPU's.
        divided: whether replicas share them.
    """

    layout: Layout
    on_host: bool = False
    divided: bool = False

    @property
    def name(self) -> str:
        return ("host" if self.on_host else "GPU") + (", `shard_over`" if self.divided else "")

    @property
    def parameters(self) -> float:
        """Those that a rank averages."""
        return self.layout.here / (self.layout.replicas if self.divided else 1)

    @property
    def gpu_bytes(self) -> float:
        return 0 if self.on_host else kept_bytes(self.layout.suite) * self.parameters

    @property
    def host_bytes(self) -> float:
        staging = NUM_SETS * self.layout.suite.source.itemsize
        return (kept_bytes(self.layout.suite) + staging) * self.parameters * RANKS_OF_A_NODE if self.on_host else 0

    @property
    def gpu_traffic(self) -> float:
        """Read and written by one update's kernel, here and in `host_traffic`."""
        return 0 if self.on_host else self.layout.suite.bytes_per_parameter * self.parameters

    @property
    def pcie_traffic(self) -> float:
        return self.layout.suite.source.itemsize * self.parameters if self.on_host else 0

    @property
    def host_traffic(self) -> float:
        return self.layout.suite.bytes_per_parameter * self.parameters * RANKS_OF_A_NODE if self.on_host else 0

    def seconds(self, machine: Machine) -> tuple[float | None, float | None, float | None]:
        """Of one update on the GPU, on the way to the host, and there; None where nothing is to do or known."""
        needed = (
            (self.gpu_traffic, update_rate("cuda", self.layout.suite)),
            (self.pcie_traffic, PCIE),
            (self.host_traffic, update_rate("cpu", self.layout.suite)),
        )
        on_gpu, on_the_way, on_host = (
            num_bytes / machine.rates[rate] if num_bytes and rate in machine.rates else None
            for num_bytes, rate in needed
        )
        return on_gpu, on_the_way, on_host


def kept_bytes(suite: Suite) -> int:
    """A parameter's, in one average with its second term."""
    return (suite.bytes_per_parameter - suite.source.itemsize) // 2


def places(layout: Layout) -> list[Place]:
    """Those worth a thought: nobody wants what replicas could share several times in one host's memory."""
    shared = layout.replicas > 1
    return [
        Place(layout),
        *([Place(layout, divided=True)] if shared else []),
        Place(layout, on_host=True, divided=shared),
    ]


def every_place() -> list[Place]:
    return [place for layout in LAYOUTS for place in places(layout)]


def gigabytes(num_bytes: float) -> str:
    return digits(num_bytes / GIGABYTE) if num_bytes else ""


def mode_table(found: Sequence[Machine]) -> Table:
    columns = [(machine, device) for machine in found for device in ("cuda", "cpu")]
    columns = [(m, device) for m, device in columns if any(update_rate(device, suite) in m.rates for suite in MODES)]
    rows = []
    for suite in MODES:
        rates = [machine.rates.get(update_rate(device, suite)) for machine, device in columns]
        numbers = suite.source.itemsize, kept_bytes(suite), suite.bytes_per_parameter
        rows.append((suite.title, *map(str, numbers), *("" if rate is None else gigabytes(rate) for rate in rates)))
    measured = [f"GB/s, {machine.name}" for machine, _ in columns]
    return Table("Bytes a parameter", ("averages", "source", "kept", "read and written an update", *measured), rows)


def bytes_table() -> Table:
    rows = [
        (
            place.layout.model,
            place.layout.how,
            place.name,
            *map(
                gigabytes,
                (place.gpu_bytes, place.host_bytes, place.gpu_traffic, place.pcie_traffic, place.host_traffic),
            ),
        )
        for place in every_place()
    ]
    return Table(
        "Gigabytes of one average, and those that one update moves",
        ("model", "layout", "averages on", "GPU", "node's host", "moved: GPU", "PCIe of a GPU", "node's host"),
        rows,
        num_text=3,
    )


def time_table(machine: Machine) -> Table:
    """Of what was measured there; other rows and columns are left out."""
    timed = [(place, place.seconds(machine)) for place in every_place()]
    timed = [(place, seconds) for place, seconds in timed if any(seconds)]
    columns = [n for n in range(len(WAYS)) if any(seconds[n] for _, seconds in timed)]
    return Table(
        f"Milliseconds a step, for every={', '.join(map(str, EVERY))}: {machine.name}",
        ("model", "layout", "averages on", *(WAYS[n] for n in columns)),
        [
            (place.layout.model, place.layout.how, place.name, *(by_every(seconds[n]) for n in columns))
            for place, seconds in timed
        ],
        num_text=3,
    )


def by_every(seconds: float | None) -> str:
    return "" if seconds is None else " · ".join(digits(seconds * 1e3 / every) for every in EVERY)


def tables(found: Sequence[Machine]) -> list[Table]:
    return [mode_table(found), bytes_table(), *map(time_table, found)]


def text(found: Sequence[Machine]) -> str:
    """What stands in the docs."""
    return "\n".join(table.markdown() for table in tables(found))


def main(
    write: Annotated[bool, typer.Option(help=f"Also write it to docs/{PAGE.name}.")] = False,
) -> None:
    """Say what averages of large models take, from rates that were measured."""
    found = machines()
    console = Console(width=190)
    for table in tables(found):
        console.print(table.rich())
    if write:
        write_text(PAGE, MARK, text(found))
        console.print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    typer.run(main)
