"""Runs commands side by side in a box of time: whatever they do, it ends, and what they printed is kept."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

GRACE = 3.0  # seconds after the box, in which a command may still say what it knows
ROOT = Path(__file__).parents[2]

Take = Callable[[str, str], object]


def run(commands: Mapping[str, Sequence[str]], *, seconds: float, log: Path, take: Take) -> dict[str, int | None]:
    """Runs arguments of Python, each in a group of processes of its own.

    Args:
        commands: by a name that is put before each line in the log.
        seconds: the box; what still runs afterwards is interrupted, and killed after a moment.
        log: a file for all that they print.
        take: is given the name of a command and each line that it prints.

    Returns:
        The exit codes by name; None for a command that was ended because its box was over.
    """
    end = time.monotonic() + seconds
    running: dict[str, subprocess.Popen[str]] = {}
    readers: list[threading.Thread] = []
    with log.open("w") as file:
        lock = threading.Lock()
        try:
            for name, command in commands.items():
                running[name] = process = _begin(command)
                readers.append(threading.Thread(target=_read, args=(name, process, file, lock, take), daemon=True))
                readers[-1].start()
            codes = {name: _wait(process, end) for name, process in running.items()}
            _interrupt([running[name] for name, code in codes.items() if code is None])
        finally:
            for process in running.values():
                _signal(process, signal.SIGKILL)  # what it has started, and itself
                # Not for ever: a process that waits inside of a driver does not even die.
                _wait(process, time.monotonic() + GRACE)
            for reader in readers:
                reader.join(GRACE)  # a process that left its group may hold the pipe open
            with lock:
                file.flush()
    return codes


def _begin(command: Sequence[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                map(str, (ROOT / "src", ROOT, *filter(None, [os.environ.get("PYTHONPATH")])))
            ),
            "PYTHONUNBUFFERED": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _read(name: str, process: "subprocess.Popen[str]", file: IO[str], lock: threading.Lock, take: Take) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            with lock:
                if file.closed:
                    return
                file.write(f"{name}: {line.rstrip()}\n")
                file.flush()
                take(name, line.rstrip("\n"))


def _wait(process: "subprocess.Popen[str]", end: float) -> int | None:
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _interrupt(late: Sequence["subprocess.Popen[str]"]) -> None:
    """As Ctrl-C does: pytest then says what has failed so far."""
    for process in late:
        _signal(process, signal.SIGINT)
    end = time.monotonic() + GRACE
    for process in late:
        _wait(process, end)


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    # The group is named after its first process, and may outlive it.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
