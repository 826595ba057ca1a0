"""What torch's allocator holds at most, as its profiler counts it."""

import contextlib

import torch


class Peak:
    """The largest number of bytes that torch held at any time beyond those at the beginning."""

    bytes = 0


@contextlib.contextmanager
def peak_memory():
    peak = Peak()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    held = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak.bytes = max(peak.bytes, held)
