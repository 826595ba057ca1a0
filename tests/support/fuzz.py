"""Reads files that were broken in many ways: each is a FileFormatError, or read as torch and safetensors read it.

    python tests/support/fuzz.py --files 100000

Every file of `tests/data/files`, and trees of containers made at random, are mutated: bits are flipped, ends cut off,
parts of other files put in; in pickles, whose checksums are then made right again, numbers grow and names change; in
headers of safetensors shapes, offsets and dtypes. A file fails that raises anything else, takes more than five seconds
or a gibibyte, or is read with other numbers than by the libraries themselves.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

import polyak
from library_files import CASES, FILES
from polyak.files.layouts import LAYOUTS

SECONDS, BYTES = 5, 1 << 30
NUMBERS = [0, 1, 2, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
NAMES = [b"os\nsystem", b"builtins\neval", b"torch\nFloatStorage", b"torch._utils\n_rebuild_qtensor", b"torch\nSize"]
NAMES += [b"collections\nOrderedDict", b"argparse\nNamespace", b"torch._utils\n_rebuild_parameter", b"torch\nbfloat16"]
OPERATIONS = [bytes([operation]) for operation in sorted(ord(one.code) for one in pickletools.opcodes)]
WORDS = sorted(
    {word for layout in LAYOUTS for place in (*layout.average, *layout.raw, *layout.marks) for word in place.split("/")}
)


class Mutator:
    """Makes broken files of good ones; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seeds = [FILES / name for name in CASES]
        self.all_bytes = [
            file.read_bytes() for seed in self.seeds for file in sorted(seed.rglob("*")) if file.is_file()
        ]

    def make(self, folder: Path) -> tuple[Path, str]:
        """Writes a broken file, or folder of files, and returns where it is and how it was broken."""
        if self.random.random() < 0.1:
            return self.tree(folder), "tree"
        seed = self.random.choice(self.seeds)
        target = folder / seed.name
        shutil.copytree(seed, target)
        path = target / json.loads((seed / "about.json").read_text())["path"]
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        file = self.random.choice(files)
        data = file.read_bytes()
        ways = [self.flip, self.cut, self.splice, self.number]
        if zipfile.is_zipfile(file):
            ways += [self.pickle] * 6
        if file.suffix == ".safetensors":
            ways += [self.header] * 4
        way = self.random.choice(ways)
        broken = way(data)
        file.write_bytes(broken)
        return path, way.__name__

    def flip(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self.random.choice([1, 1, 1, 2, 8, 64])):
            if changed:
                changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def cut(self, data: bytes) -> bytes:
        return data[: self.random.randrange(len(data) + 1)] + bytes(self.random.choice([0, 0, 1, 100]))

    def splice(self, data: bytes) -> bytes:
        other = self.random.choice(self.all_bytes)
        start = self.random.randrange(len(other) + 1)
        part = other[start : start + self.random.randrange(1, 400)]
        place = self.random.randrange(len(data) + 1)
        return data[:place] + part + data[place + self.random.choice([0, len(part)]) :]

    def number(self, data: bytes) -> bytes:
        size, form = self.random.choice([(1, "<B"), (2, "<H"), (4, "<I"), (8, "<Q")])
        place = self.random.randrange(max(1, len(data) - size))
        value = self.random.choice(NUMBERS) % (1 << 8 * size)
        return data[:place] + struct.pack(form, value) + data[place + size :]

    def pickle(self, data: bytes) -> bytes:
        """Breaks the pickle of an archive, and makes its checksum right."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                records = {record.filename: archive.read(record) for record in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            return self.flip(data)
        for name, content in records.items():
            if name.endswith("data.pkl"):
                records[name] = self.operations(content)
        changed = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(changed, "w") as archive:
            warnings.simplefilter("ignore")
            for name, content in records.items():
                archive.writestr(name, content)
        return changed.getvalue()

    def operations(self, data: bytes) -> bytes:
        choice = self.random.randrange(7)
        places = [place for _, _, place in pickletools.genops(data)]
        place = self.random.choice(places)
        if choice == 0:
            return self.flip(data)
        if choice == 1:
            value = self.random.choice(NUMBERS)
            inserted = b"\x8a" + bytes([9]) + value.to_bytes(9, "little", signed=False)
            end = places[min(places.index(place) + 1, len(places) - 1)]
            return data[:place] + inserted + data[max(end, place) :]
        if choice == 2:
            name = self.random.choice(NAMES)
            return data[:place] + b"c" + name + b"\n" + self.random.choice([b"", b")R", b")\x81", b"0"]) + data[place:]
        if choice == 3:
            end = self.random.choice(places)
            return data[: min(place, end)] + data[max(place, end) :]
        if choice == 4:
            end = self.random.choice(places)
            return (
                data[:place] + data[min(place, end) : max(place, end)] * self.random.choice([1, 2, 50]) + data[place:]
            )
        if choice == 5:
            inserted = b"".join(self.random.choice(OPERATIONS) for _ in range(self.random.choice([1, 2, 5])))
            return data[:place] + inserted + data[place:]
        return self.number(data)

    def header(self, data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        try:
            header = json.loads(data[8 : 8 + length])
        except ValueError:
            return self.flip(data)
        names = [name for name in header if name != "__metadata__"]
        entry = header[self.random.choice(names)]
        change = self.random.randrange(5)
        if change == 0:
            entry["shape"] = [self.random.choice(NUMBERS) for _ in range(self.random.randrange(4))]
        elif change == 1:
            entry["data_offsets"] = [self.random.choice(NUMBERS), self.random.choice(NUMBERS)]
        elif change == 2:
            entry["dtype"] = self.random.choice(["F32", "BF16", "I64", "F8_E4M3", "X", "BOOL", "F4", "C64"])
        elif change == 3:
            header["__metadata__"] = self.random.choice(
                [None, {}, {"profile": "{", "time": "x", "num_updates": "1"}, [1]]
            )
        else:
            header[self.random.choice(WORDS)] = entry
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]

    def tree(self, folder: Path) -> Path:
        """A file of any tree of containers under the keys that layouts know."""
        torch.save({self.word(): self.branch(4) for _ in range(self.random.randrange(5))}, folder / "tree.pt")
        return folder / "tree.pt"

    def word(self) -> str:
        word = self.random.choice(WORDS)
        return word.replace("*", "a.weight").replace("{}", "0").replace("#", "0").replace("?", "0")

    def branch(self, depth: int) -> object:
        kind = self.random.randrange(9 if depth else 5)
        if kind < 2:
            shape = [self.random.choice([0, 1, 2, 3]) for _ in range(self.random.randrange(4))]
            return torch.ones(shape, dtype=self.random.choice([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
        if kind < 5:
            return self.random.choice([None, 1, -1, 2.5, "text", True, float("nan"), 2**80, b"bytes"])
        if kind < 8:
            return {self.word(): self.branch(depth - 1) for _ in range(self.random.randrange(4))}
        return [self.branch(depth - 1) for _ in range(self.random.randrange(4))]


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """All tensors that a file gives, made and looked at."""
    checkpoint = polyak.read(path)
    found: dict[str, torch.Tensor] = {}
    for average, tensors in [
        *checkpoint.averages.items(),
        *([("", checkpoint.raw_weights)] if checkpoint.raw_weights else []),
    ]:
        for name, tensor in tensors.items():
            found[f"{average}/{name}"] = tensor
            if tensor.numel():
                tensor.flatten()[-1].item()
    str(checkpoint)
    return found


def as_libraries_read(path: Path) -> list[torch.Tensor] | None:
    """All tensors that torch or safetensors find in a file; None where they refuse it."""
    try:
        if path.suffix == ".safetensors":
            return list(load_file(path).values())
        # Without mmap, torch reads other bytes where attributes in the directory of the archive are broken.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:
        return None
    found: list[torch.Tensor] = []
    left, seen = [content], set()
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            found.append(value.detach())
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
    return found


def is_among(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
    return any(
        tensor.shape == other.shape and tensor.dtype == other.dtype and _bits(tensor) == _bits(other)
        for other in others
    )


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


# Their numbers are computed, pieced together, or in a neighbour: no single tensor of the file is like them.
_COMPUTED = ("schedule-free", "nemo", "guided-diffusion")


def try_one(path: Path) -> tuple[str, str]:
    """What came of a file: "refused", "read" or "failed", and why."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    signal.alarm(SECONDS)
    try:
        found = read_all(path)
        outcome, why = "read", ""
    except polyak.FileFormatError as error:
        found, outcome, why = {}, "refused", ""
        if isinstance(error.__cause__, MemoryError):
            outcome, why = "failed", "it asked for more than a gibibyte"
    except BaseException as error:
        found, outcome, why = {}, "failed", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    if time.perf_counter() - start > SECONDS:
        return "failed", "it took more than five seconds"
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > BYTES:
        return "failed", "it took more than a gibibyte"
    if outcome == "read" and path.is_file() and not any(name in str(path) for name in _COMPUTED):
        others = as_libraries_read(path)
        if others is not None:
            wrong = [name for name, tensor in found.items() if not is_among(tensor, others)]
            if wrong:
                return "failed", f"{wrong[0]} is not what the libraries read"
    return outcome, why


def _stop(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def work(arguments: tuple[int, int, str]) -> tuple[Counter[str], list[str]]:
    """A share of the files: what came of them, and those that failed."""
    seed, count, keep = arguments
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _stop)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BYTES + (256 << 20), resource.RLIM_INFINITY))
    mutator, counts, failures = Mutator(seed), Counter[str](), []
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="polyak-fuzz-") as name:
        for number in range(count):
            folder = Path(name) / str(number)
            folder.mkdir()
            path, way = mutator.make(folder)
            outcome, why = try_one(path)
            counts[outcome] += 1
            counts[f"{way}: {outcome}"] += 1
            if outcome == "failed":
                failures.append(f"{path.relative_to(name)}, {way}: {why}")
                if keep:
                    shutil.copytree(folder, Path(keep) / f"{seed}-{number}", dirs_exist_ok=True)
            shutil.rmtree(folder)
    return counts, failures


def told(counts: Counter[str], way: str = "") -> str:
    return ", ".join(f"{counts[way + outcome]} {outcome}" for outcome in ("refused", "read", "failed"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", default="", help="folder for the files that fail")
    options = parser.parse_args()
    share = -(-options.files // max(1, options.processes))
    tasks, left = [], options.files
    while left > 0:
        size = min(left, share, 2_000)
        tasks.append((options.seed * 1_000_003 + len(tasks), size, options.keep))
        left -= size
    start = time.perf_counter()
    counts, failures = Counter[str](), []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for done, (some, failed) in enumerate(pool.imap_unordered(work, tasks), 1):
            counts += some
            failures += failed
            print(f"\r{done} of {len(tasks)} shares, {counts['failed']} failed", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    seconds = time.perf_counter() - start
    print(f"{options.files} files in {seconds:.0f} s: {told(counts)}")
    for way in sorted({key.partition(": ")[0] for key in counts if ": " in key}):
        print(f"  {way}: {told(counts, f'{way}: ')}")
    print("\n".join(failures[:20]))
    return 1 if counts["failed"] or counts["refused"] + counts["read"] != options.files else 0


if __name__ == "__main__":
    sys.exit(main())
