"""A pytest plugin that reports the start, outcome and end of each test with `emit`.

pytest's own output depends on its version, and on what tests print themselves.
"""

import os

import pytest

from benchmarks.gpu.emit import emit

# pytest loads this plugin before it starts to capture output.
_OUT = os.fdopen(os.dup(1), "w", buffering=1)


def emit_test(test: str, event: str) -> None:
    emit(_OUT, test=test, event=event)


def pytest_runtest_logstart(nodeid: str) -> None:
    emit_test(nodeid, "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        emit_test(report.nodeid, report.outcome)


def pytest_runtest_logfinish(nodeid: str) -> None:
    emit_test(nodeid, "ended")


def pytest_unconfigure() -> None:
    _OUT.close()
