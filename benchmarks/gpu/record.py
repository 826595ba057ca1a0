"""The record of a run on a GPU, in the form of the others in `benchmarks/results/`: what its parts have reported."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.emit import emitted
from benchmarks.records import markdown, write_files
from benchmarks.table import Table, digits, mark

TITLE = "What averages cost on a GPU"
TRIAL = "A trial of the GPU run on a CPU"
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
NOT_STARTED, INTERRUPTED = "not started", "interrupted"
MOST_FAILURES = 25  # that are shown of one part
MOST_CHARACTERS = 200
FAILURES = ("FAILED ", "ERROR ", "E   ")  # how pytest begins lines about them


@dataclass
class TestFile:
    """The outcomes of the tests in one file; `under_way` is the test that was running when the process ended."""

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list[str])
    under_way: str = ""

    def take(self, test: str, event: str) -> None:
        """Takes what `pytest_plugin` reports of a test."""
        if event == "started":
            self.under_way = test
        elif event == "ended":
            self.under_way = ""
        elif event == "failed":
            self.failed.append(test)
        elif event == "skipped":
            self.skipped += 1
        else:
            self.passed += 1


@dataclass
class PartRecord:
    """The outcome of a part, with the exit code of each process (None if it timed out) and the last line it printed."""

    name: str
    outcome: str
    seconds: float = 0.0
    box: float = 0.0
    exit_codes: dict[str, int | None] = field(default_factory=dict[str, int | None])
    failures: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    last_lines: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Record:
    """What is known so far.

    Attributes:
        device: cuda or cpu.
        missing: packages that are not installed.
        machine: its description by `benchmarks.machine`.
        parts: the outcomes of the parts, in the order in which they were run.
        tests: outcomes by test file.
        found: the other results, by their keys in the JSON file.
        tables: the tables that parts have reported, for the markdown file.
    """

    device: str
    missing: list[str] = field(default_factory=list[str])
    machine: dict[str, str] = field(default_factory=dict[str, str])
    parts: list[PartRecord] = field(default_factory=list[PartRecord])
    tests: dict[str, TestFile] = field(default_factory=dict[str, TestFile])
    found: dict[str, Any] = field(default_factory=lambda: {"updates": [], "verdicts": []})
    tables: list[Table] = field(default_factory=list[Table])

    def take(self, part: PartRecord, process: str, line: str) -> None:
        """Takes a line that a process of a part has printed."""
        results = emitted(line)
        self.machine = results.get("machine", self.machine)
        if "table" in results:
            self.tables.append(Table(**results["table"]))
        if "update" in results:
            self.found["updates"].append(results["update"])
        self.found["verdicts"] += results.get("verdicts", [])
        self.found.update({key: results[key] for key in ("bits", "copies", "host") if key in results})
        if "note" in results:
            part.notes.append(" ".join(results["note"].split()))
        if "test" in results:
            self.tests.setdefault(process, TestFile()).take(**results)
        if "failure" in results:
            part.failures.append(results["failure"])
        elif line.startswith(FAILURES):
            part.failures.append(line)
        if line.strip() and not results:
            part.last_lines[process] = line[:MOST_CHARACTERS]

    def end(self, part: PartRecord, exit_codes: dict[str, int | None]) -> None:
        """Takes the exit codes of the processes of a part."""
        part.exit_codes = exit_codes
        if not part.failures:
            failed = [process for process, code in exit_codes.items() if code]
            part.failures += [f"{name}: {part.last_lines.get(name, 'printed nothing')}" for name in failed]
        if self.device == "cuda":
            files = [name for name in exit_codes if name.startswith("test_")]
            without = [name for name in files if not self.tests.setdefault(name, TestFile()).passed]
            part.failures += [f"no test in {name} has passed" for name in without]
        if None in exit_codes.values():
            part.outcome = TIMED_OUT
        else:
            part.outcome = FAILED if any(exit_codes.values()) or part.failures else PASSED

    @property
    def stem(self) -> str:
        if self.device == "cpu":
            return "gpu-run-on-cpu"
        name = self.machine.get("gpu", "unknown")
        return "gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def record(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "missing": self.missing,
            "parts": [asdict(part) for part in self.parts],
            "tests": {name: asdict(file) for name, file in self.tests.items()},
            **self.found,
        }

    def all_tables(self) -> list[Table]:
        tables = [self._parts(), self._tests(), self._failures(), *self.tables, self._verdicts()]
        return [table for table in tables if table.rows]

    def write(self, folder: Path) -> list[Path]:
        """Writes two files, which are named after the GPU once it is known."""
        about = dict(self.machine)
        if self.missing:
            about["not installed"] = ", ".join(self.missing)
        paths = write_files(
            self.stem,
            self.record(),
            markdown(about, self.all_tables(), title=TITLE if "gpu" in self.machine else TRIAL),
            folder,
        )
        for path in {*folder.glob("gpu-unknown.*")} - {*paths}:
            path.unlink()
        return paths

    def _parts(self) -> Table:
        rows = [
            (part.name, part.outcome, "; ".join(part.notes), f"{part.seconds:.0f}", f"{part.box:.0f}")
            for part in self.parts
        ]
        return Table("Parts of the run", ("part", "outcome", "notes", "seconds", "time box"), rows, num_text=3)

    def _tests(self) -> Table:
        rows = [
            (name, file.under_way, str(file.passed), str(len(file.failed)), str(file.skipped))
            for name, file in self.tests.items()
        ]
        return Table("Tests", ("file", "running at the end", "passed", "failed", "skipped"), rows, num_text=2)

    def _failures(self) -> Table:
        rows = [
            (part.name, " ".join(line.split())[:MOST_CHARACTERS])
            for part in self.parts
            for line in part.failures[:MOST_FAILURES]
        ]
        return Table("What failed", ("part", "what"), rows, num_text=2)

    def _verdicts(self) -> Table:
        rows = [
            (each["suite"], each["shape"], each["what"], each["bound"], digits(each["value"]), mark(each["reached"]))
            for each in self.found["verdicts"]
        ]
        return Table("Must reach", ("averages", "model", "what", "bound", "measured", ""), rows, num_text=3)
