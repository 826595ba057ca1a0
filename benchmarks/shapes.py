"""The models whose updates are timed. A new shape is one more row of SHAPES."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """One model: `entries` is the length of its state_dict, checked, so that the numbers stay comparable."""

    name: str
    title: str
    entries: int
    rounds: int
    build: Callable[[], nn.Module]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build()
        found = len(model.state_dict())
        if found != self.entries:
            raise ValueError(f"{self.title} should have {self.entries} entries, this one has {found}")
        return model


def small_tensors() -> nn.Module:
    return nn.ParameterList(torch.randn(32, 32) for _ in range(1000))


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


SHAPES = (
    Shape("small", "1000 tensors of 32x32", entries=1000, rounds=100, build=small_tensors),
    Shape("resnet50", "ResNet-50", entries=320, rounds=80, build=resnet50),
    Shape("vit", "ViT-B/16", entries=200, rounds=40, build=vit_base),
    Shape("gpt2", "GPT-2 124M", entries=149, rounds=40, build=gpt2),
)
