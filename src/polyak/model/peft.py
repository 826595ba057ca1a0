"""Models of which only adapters are trained (peft): their averages are exported as adapters."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

ADAPTER_FILE = "adapter_model.safetensors"  # as peft calls it


def is_adapted(model: nn.Module) -> bool:
    """Whether a bare model is peft's, with adapters on a frozen base."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapter_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that belong to the active adapter, under the names that peft saves them by."""
    peft: Any = sys.modules["peft"]
    adapter: str = cast("Any", model).active_adapter
    return peft.get_peft_model_state_dict(model, state_dict=dict(tensors), adapter_name=adapter)


def write_adapter_config(model: nn.Module, directory: Path) -> None:
    """Writes what peft needs beside the weights to load the active adapter."""
    adapted = cast("Any", model)
    adapted.peft_config[adapted.active_adapter].save_pretrained(directory)
