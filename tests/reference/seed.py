"""The formula of the classic class, in float64, over everything that a model's `state_dict` holds."""

import torch

from reference.recursion import widen


class SeedFormula:
    """`ema = ema * decay + (1 - decay) * model` for floating-point entries, the newest value for others."""

    def __init__(self, tensors, decay):
        self.decay = decay
        self.ema = {name: _start(tensor) for name, tensor in tensors.items()}

    def update(self, tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point() or tensor.is_complex():
                self.ema[name] = self.ema[name] * self.decay + (1 - self.decay) * widen(tensor)
            else:
                self.ema[name] = tensor.clone()

    def largest_error(self, tensors):
        return max(_error(self.ema[name], tensor) for name, tensor in tensors.items())


def _start(tensor):
    return widen(tensor) if tensor.is_floating_point() or tensor.is_complex() else tensor.clone()


def _error(expected, found):
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, found) else float("inf")
    scale = expected.abs().max().clamp_min(1e-30)
    return float((widen(found) - expected).abs().max() / scale)
