"""Interruptions at any line of polyak, as a signal handler could raise one."""

import sys
from pathlib import Path

import torch

import polyak

HOUSE = str(Path(polyak.__file__).parent)


class Interrupt(BaseException):
    pass


def interrupt_at(position):
    """Raises at the n-th line of polyak that runs, as a signal handler could; then never again."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(HOUSE):
            return None
        if event == "line":
            seen += 1
            if seen == position:
                sys.settrace(None)
                raise Interrupt
        return trace

    return trace


def every_interruption(make, call):
    """Calls `call(thing)` on a new thing each time, interrupted at its first line, its second, and so on.

    Yields each thing that was interrupted.
    """
    position, is_interrupted = 0, True
    while is_interrupted:
        position += 1
        thing = make()
        try:
            sys.settrace(interrupt_at(position))
            call(thing)
            is_interrupted = False
        except Interrupt:
            yield thing
        finally:
            sys.settrace(None)
            # An exception at the very end of a `with`, which only a trace can raise, leaves what it has entered.
            torch.set_grad_enabled(True)
