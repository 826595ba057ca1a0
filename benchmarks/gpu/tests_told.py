"""A plugin of pytest that says of each test when it begins, what becomes of it and when it ends, as `emit` does.

What pytest prints itself depends on its version, and on what tests print in between.
"""

import os

import pytest

from benchmarks.gpu.emit import emit

# pytest loads this before it begins to capture what is printed.
_OUT = os.fdopen(os.dup(1), "w", buffering=1)


def say(test: str, what: str) -> None:
    emit(_OUT, test=test, what=what)


def pytest_runtest_logstart(nodeid: str) -> None:
    say(nodeid, "begun")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        say(report.nodeid, report.outcome)


def pytest_runtest_logfinish(nodeid: str) -> None:
    say(nodeid, "ended")


def pytest_unconfigure() -> None:
    _OUT.close()
