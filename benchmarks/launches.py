"""How many kernels an update launches on a GPU."""

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.ours import weight_average
from benchmarks.shapes import small_tensors


def count(device: torch.device | str = "cuda") -> int:
    """Of this library's update of a thousand small tensors."""
    with torch.device(device):
        model = small_tensors()
    running = weight_average(model)
    running.update()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        running.update()
        torch.cuda.synchronize()
    on_device = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)
