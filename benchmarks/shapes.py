"""The models whose updates are timed. A new shape is one more row of SHAPES."""

import functools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

GRID = 128


@dataclass(frozen=True)
class Shape:
    """One model.

    Attributes:
        name: for the command line.
        title: for tables.
        entries: the length of its state_dict, checked, so that the numbers stay comparable.
        rounds: how often the contenders take turns.
        build: makes it.
        num_calls: calls in a turn. A small model's first call of a turn finds the caches full of the others' averages,
            and on a GPU it is the whole call that counts; of large models it is the GPU's own time.
        on_gpu_only: too large for the memory of most machines otherwise.
    """

    name: str
    title: str
    entries: int
    rounds: int
    build: Callable[[], nn.Module]
    num_calls: int = 1
    on_gpu_only: bool = False

    def model(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        if self.on_gpu_only:
            return self.built(dtype, device)
        return deepcopy(kept(self)).to(device=device, dtype=dtype)

    def built(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            model = self.build().to(dtype)
        found = len(model.state_dict())
        if found != self.entries:
            raise ValueError(f"{self.title} should have {self.entries} entries, this one has {found}")
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                round_to_grid_(tensor)
        return model


@functools.lru_cache(maxsize=4)
def kept(shape: Shape) -> nn.Module:
    """To build a model takes seconds, and several suites use it."""
    return shape.built(torch.float32, "cpu")


@torch.no_grad()
def round_to_grid_(tensor: Tensor) -> None:
    """So that adding one is exact, in bfloat16 too, and the check knows where an average began."""
    tensor.mul_(GRID).round_().clamp_(-GRID, GRID).div_(GRID)


def small_tensors(count: int = 1000) -> nn.Module:
    return nn.ParameterList(torch.randn(32, 32) for _ in range(count))


def one_tensor(count: int) -> nn.Module:
    return nn.ParameterList([torch.randn(count)])


# transformers is imported where it is needed: that takes seconds, and the first shape does without.


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def vit_base() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def convnext_tiny() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(ConvNextConfig(num_labels=1000))


def bert_base() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def llama(width: int, inner: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    configuration = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(configuration)


SHAPES = (
    Shape("small", "1000 tensors of 32x32", entries=1000, rounds=60, build=small_tensors, num_calls=5),
    Shape("resnet50", "ResNet-50", entries=320, rounds=60, build=resnet50),
    Shape("vit", "ViT-B/16", entries=200, rounds=30, build=vit_base),
    Shape("gpt2", "GPT-2 124M", entries=149, rounds=20, build=gpt2),
    Shape("convnext", "ConvNeXt-T", entries=182, rounds=60, build=convnext_tiny),
    Shape("bert", "BERT-base", entries=199, rounds=20, build=bert_base),
    Shape(
        "llama-1b",
        "Llama 1.1B",
        entries=201,
        rounds=20,
        build=partial(llama, 2048, 5632, 22, 32, 4, 32000),
        on_gpu_only=True,
    ),
    Shape(
        "llama-7b",
        "Llama 6.7B",
        entries=291,
        rounds=10,
        build=partial(llama, 4096, 11008, 32, 32, 32, 32000),
        on_gpu_only=True,
    ),
)
