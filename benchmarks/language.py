"""A language model that is trained on random tokens, for what an average costs the training beside it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

STEP = "training step"  # as it is called in a trace


@dataclass(frozen=True)
class Size:
    """A language model and its steps."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    dtype: torch.dtype
    turns: int
    steps: int  # of a turn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        batch, length, width = inputs.shape
        mixed = self.attention(self.first_norm(inputs)).view(batch, length, 3, self.heads, -1)
        query, key, value = (each.transpose(1, 2) for each in mixed.unbind(2))
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        inputs = inputs + self.project(seen.transpose(1, 2).reshape(batch, length, width))
        return inputs + self.down(nn.functional.gelu(self.up(self.second_norm(inputs))))


class LanguageModel(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


class Training:
    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            self.model = LanguageModel(size).to(size.dtype)
            self._tokens = torch.randint(0, size.vocabulary, (size.batch, size.length + 1))
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> None:
        with record_function(STEP):
            found = self.model(self._tokens[:, :-1])
            nn.functional.cross_entropy(found.flatten(0, 1), self._tokens[:, 1:].flatten()).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
