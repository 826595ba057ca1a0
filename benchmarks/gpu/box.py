"""Runs commands side by side in a time box: they are killed when it is over, and their output is kept."""

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

GRACE = 3.0  # seconds between the interruption and the kill
ROOT = Path(__file__).parents[2]

Take = Callable[[str, str], object]


def run(commands: Mapping[str, Sequence[str]], *, seconds: float, log: Path, take: Take) -> dict[str, int | None]:
    """Runs Python with each list of arguments, in a process group of its own.

    Args:
        commands: the arguments, by the name that is put before each line in the log.
        seconds: the time box. Processes that still run then are interrupted, and killed a moment later.
        log: the file for their output.
        take: called with the name of a command and each line that it prints.

    Returns:
        The exit codes by name; None for a command that timed out.
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
                _signal(process, signal.SIGKILL)  # and whatever it has started
                # With a limit: a process that is stuck in a driver does not even die.
                _wait(process, time.monotonic() + GRACE)
            for reader in readers:
                reader.join(GRACE)  # with a limit: a process that left its group may hold the pipe open
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
            # Plugins of other packages may warn, and warnings are errors in our tests.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
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
    """Like Ctrl-C, so that pytest still prints its failures."""
    for process in late:
        _signal(process, signal.SIGINT)
    end = time.monotonic() + GRACE
    for process in late:
        _wait(process, end)


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    # The group has the number of its first process, and may outlive it.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
