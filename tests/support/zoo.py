"""The models that the tests share, and a step of training that moves everything in them."""

import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def batchnorm():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3))


class TiedTransformer(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens)))


class Buffers(nn.Module):
    """Buffers of every kind beside one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.arange(100))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("running", torch.randn(4))
        self.register_buffer("cache", torch.randn(3), persistent=False)
        self.register_buffer("scalar", torch.tensor(0))

    def forward(self, inputs):
        return inputs * self.weight + self.running


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

    def forward(self, inputs):
        return (inputs.to(torch.complex64) @ self.weight).abs()


MODELS = {
    "mlp": mlp,
    "batchnorm": batchnorm,
    "tied transformer": TiedTransformer,
    "buffers": Buffers,
    "complex": Complex,
    "bfloat16": lambda: mlp().bfloat16(),
    "float16": lambda: mlp().half(),
    "float64": lambda: mlp().double(),
    "mixed": lambda: nn.Sequential(nn.Linear(6, 5).bfloat16(), nn.LayerNorm(5)),
    "channels last": lambda: batchnorm().to(memory_format=torch.channels_last),
}


@torch.no_grad()
def drift(model, generator=None):
    """Moves every tensor of a model in place, as a step of training would."""
    seen = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.is_floating_point() or tensor.is_complex():
            noise = torch.randn(tensor.shape, dtype=_noise_dtype(tensor), generator=generator)
            tensor.add_(noise.to(tensor), alpha=0.1)
        elif tensor.dtype != torch.bool and tensor.dim() == 0:
            tensor.add_(1)


@torch.no_grad()
def bump(model):
    """Adds 1 to every parameter."""
    for parameter in model.parameters():
        parameter.add_(1)


def _noise_dtype(tensor):
    return torch.complex64 if tensor.is_complex() else torch.float32


def clone(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def bit_equal(one, other):
    """Whether two dictionaries hold the same tensors, bit for bit, NaNs included."""
    return one.keys() == other.keys() and all(_same_bits(one[name], other[name]) for name in one)


def _same_bits(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    return (
        one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))
        if one.dim()
        else (one.reshape(1).view(torch.uint8).equal(other.reshape(1).view(torch.uint8)))
    )
