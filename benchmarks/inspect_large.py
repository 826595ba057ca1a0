"""What `polyak inspect` takes for a large file: `python -m benchmarks.inspect_large [--gigabytes 10] [--folder DIR]`.

The file is made first: averages and weights of a transformer in float32, as torch.save or safetensors write them.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.table import Table

WIDTH = 4096
BLOCK = 1 << 24
# What the system tells of a child's memory counts that of its parent, too: the child says it itself.
CODE = """
import atexit, sys
from pathlib import Path
from polyak.cli import main
atexit.register(lambda: sys.stderr.write(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
main()
"""
COMMAND = [sys.executable, "-c", CODE, "inspect", "--json"]
COLUMNS = ("file", "command", "cache", "seconds", "peak MB", "numbers read")


def shapes(num_bytes: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a transformer that take so many bytes, about."""
    layer = {"attention": (4 * WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH), "norm": (WIDTH,)}
    count = round(num_bytes / (12 * WIDTH * WIDTH * 4 + 4 * WIDTH))
    return {f"layers.{place}.{name}": shape for place in range(count) for name, shape in layer.items()}


def blocks(num_bytes: int) -> Iterator[bytes]:
    """Random numbers, the same ones again and again, each time a little shifted."""
    given = np.random.default_rng(0).standard_normal(BLOCK // 2, np.float32).tobytes()
    for place in range(-(-num_bytes // BLOCK)):
        start = 4 * (place % 997)
        yield given[start : start + min(BLOCK, num_bytes - place * BLOCK)]


def write_safetensors(path: Path, num_bytes: int) -> None:
    header, end = {}, 0
    for prefix in ("online_model", "ema_model"):
        for name, shape in shapes(num_bytes // 2).items():
            begin, end = end, end + 4 * int(np.prod(shape))
            header[f"{prefix}.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(blocks(end))


def write_torch(path: Path, num_bytes: int) -> None:
    """By torch.save, of tensors that a small file stands in for, so that they take no memory."""
    given = shapes(num_bytes // 2)
    largest = max(4 * int(np.prod(shape)) for shape in given.values())
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        file.writelines(blocks(largest))
        file.flush()
        copies = {
            key: {
                name: torch.from_numpy(np.memmap(file.name, np.float32, "c", 0, shape)) for name, shape in given.items()
            }
            for key in ("state_dict", "state_dict_ema")
        }
        torch.save(copies, path)


def measure(path: Path, arguments: list[str], *, cold: bool) -> tuple[str, ...]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED if cold else os.POSIX_FADV_NORMAL)
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, *arguments, str(path)], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    reading = json.loads(done.stdout)["reading"]
    share = reading["num_read"] / reading["num_numbers"]
    cache = "cold" if cold else "warm"
    return (
        path.name,
        " ".join(arguments),
        cache,
        f"{seconds:.2f}",
        f"{int(done.stderr) * 1024 / 1e6:.0f}",
        f"{share:.2%}",
    )


def main(
    gigabytes: Annotated[float, typer.Option(min=0.1)] = 10,
    folder: Annotated[
        Path | None, typer.Option(help="Where the files are made. Default: the folder for these.")
    ] = None,
    kinds: Annotated[str, typer.Option(help="Of files.")] = "safetensors,torch",
    verify: Annotated[bool, typer.Option(help="Also with --verify, which reads everything.")] = True,
) -> None:
    writers = {"safetensors": write_safetensors, "torch": write_torch}
    rows: list[Sequence[str]] = []
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for kind in kinds.split(","):
            path = Path(made) / f"{gigabytes:g}-GB.{'pt' if kind == 'torch' else kind}"
            writers[kind](path, int(gigabytes * 1e9))
            rows += [measure(path, [], cold=True), measure(path, [], cold=False)]
            if verify:
                rows.append(measure(path, ["--verify"], cold=True))
            path.unlink()
    Console().print(Table("polyak inspect", COLUMNS, rows, num_text=3).rich())


if __name__ == "__main__":
    typer.run(main)
