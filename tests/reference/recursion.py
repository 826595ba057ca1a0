"""Averages in float64, one tensor after another, straight from the definition."""

import torch


class Recursion:
    """`average = average + (1 - g(previous) / g(now)) * (source - average)`, with g written as it is in the papers."""

    def __init__(self, tensors, mass):
        self.mass = mass
        self.time = 0.0
        self.average = {name: widen(tensor) for name, tensor in tensors.items()}

    def update(self, tensors, now):
        kept = self.mass(self.time) / self.mass(now)
        for name, tensor in tensors.items():
            self.average[name] = kept * self.average[name] + (1 - kept) * widen(tensor)
        self.time = now


def widen(tensor):
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def exponential_mass(decay):
    return lambda t: decay**-t


def debiased_mass(decay):
    return lambda t: decay**-t - 1


def power_mass(exponent):
    return lambda t: t ** (exponent + 1)


def uniform_mass(t):
    return t
