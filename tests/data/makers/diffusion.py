"""Folders of Hugging Face: diffusers, transformers and peft; accelerate's states; trl."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from makers.common import STEPS, case, train, write


def _diffusers() -> tuple[Any, Any, torch.optim.Optimizer]:
    """A model of diffusers, its EMA after some steps, and the optimizer."""
    from diffusers import ModelMixin
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.training_utils import EMAModel

    class TinyModel(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 4, out: int = 2) -> None:
            super().__init__()
            self.stem = nn.Linear(3, width)
            self.norm = nn.BatchNorm1d(width)
            self.head = nn.Linear(width, out)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.norm(self.stem(inputs)))

    torch.manual_seed(0)
    model = TinyModel()
    model.stem.bias.requires_grad_(False)
    ema = EMAModel(
        model.parameters(), decay=0.9, use_ema_warmup=True, power=0.75, model_cls=TinyModel, model_config=model.config
    )
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    return model, ema, optimizer


def _named(model: nn.Module, tensors: list[Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, tensors, strict=True)), names


def _counters(ema: Any) -> dict[str, float]:
    return {"optimization_step": ema.optimization_step}


@case("diffusers-state")
def diffusers_state(folder: Path) -> None:
    model, ema, optimizer = _diffusers()
    train(model, optimizer, lambda step: ema.step(model.parameters()))
    torch.save(ema.state_dict(), folder / "ema.pt")
    average, names = _named(model, ema.shadow_params)
    write(
        folder,
        path="ema.pt",
        format="diffusers-state",
        libraries=["diffusers"],
        averages={"average": average},
        names=names,
        counters=_counters(ema),
        decay=ema.decay,
    )


@case("diffusers-state-accelerate")
def diffusers_state_accelerate(folder: Path) -> None:
    from accelerate import Accelerator

    model, ema, optimizer = _diffusers()
    accelerator = Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(ema)
    train(prepared, wrapped, lambda step: ema.step(model.parameters()))
    accelerator.save_state(str(folder / "checkpoint-6"))
    average, names = _named(model, ema.shadow_params)
    write(
        folder,
        path="checkpoint-6/custom_checkpoint_0.pkl",
        format="diffusers-state",
        libraries=["diffusers", "accelerate"],
        averages={"average": average},
        names=names,
        counters=_counters(ema),
        decay=ema.decay,
    )


@case("diffusers")
def diffusers_folder(folder: Path) -> None:
    """The two folders that the example scripts write by their hooks in `save_state`."""
    model, ema, optimizer = _diffusers()
    train(model, optimizer, lambda step: ema.step(model.parameters()))
    ema.save_pretrained(str(folder / "unet_ema"))
    model.save_pretrained(str(folder / "unet"))
    _write_diffusers(folder, model, ema, raw="unet")


@case("diffusers-sharded")
def diffusers_sharded(folder: Path) -> None:
    _diffusers_other(folder, max_shard_size=80)


@case("diffusers-bin")
def diffusers_bin(folder: Path) -> None:
    """As before safetensors: `diffusion_pytorch_model.bin`."""
    _diffusers_other(folder, safe_serialization=False)


def _diffusers_other(folder: Path, **options: Any) -> None:
    """What `EMAModel.save_pretrained` does, which passes no options on."""
    model, ema, optimizer = _diffusers()
    train(model, optimizer, lambda step: ema.step(model.parameters()))
    averaged = ema.model_cls.from_config(ema.model_config)
    averaged.register_to_config(**{key: each for key, each in ema.state_dict().items() if key != "shadow_params"})
    ema.copy_to(averaged.parameters())
    averaged.save_pretrained(str(folder / "unet_ema"), **options)
    _write_diffusers(folder, model, ema)


def _write_diffusers(folder: Path, model: nn.Module, ema: Any, raw: str | None = None) -> None:
    average, _ = _named(model, ema.shadow_params)
    # The library saves a new model with the averaged parameters: its buffers are those of a new model.
    buffers = dict(ema.model_cls.from_config(ema.model_config).named_buffers())
    write(
        folder,
        path="unet_ema",
        format="diffusers",
        libraries=["diffusers"],
        averages={"average": {**average, **buffers}},
        raw=model.state_dict() if raw else None,
        counters=_counters(ema),
        decay=ema.decay,
        fresh_buffers=list(buffers),
        **({"raw_path": raw} if raw else {}),
    )


def _language_model(tied: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11,
        n_positions=6,
        n_embd=4,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
    )
    return GPT2LMHeadModel(config)


def _train_language_model(model: nn.Module, after_step: Callable[[], object]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(0, 11, (2, 5), generator=generator)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        after_step()


def _transformers(folder: Path, tied: bool, **options: Any) -> None:
    """The average of `AveragedModel`, saved as any model of transformers."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = _language_model(tied)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    _train_language_model(model, lambda: averaged.update_parameters(model))
    averaged.module.save_pretrained(str(folder / "model"), **options)
    average = dict(averaged.module.state_dict())
    shared = {"lm_head.weight": "transformer.wte.weight"} if tied else {}
    write(
        folder,
        path="model",
        format="huggingface",
        libraries=["transformers"],
        averages={"average": {key: tensor for key, tensor in average.items() if key not in shared}},
        # The library leaves all names but one of a tied weight out of the file.
        tied=shared,
    )


@case("huggingface")
def huggingface(folder: Path) -> None:
    _transformers(folder, tied=True)


@case("huggingface-sharded")
def huggingface_sharded(folder: Path) -> None:
    _transformers(folder, tied=False, max_shard_size=500)


@case("peft")
def peft_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from torch_ema import ExponentialMovingAverage

    model = get_peft_model(_language_model(tied=True), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    trained = [each for each in model.parameters() if each.requires_grad]
    ema = ExponentialMovingAverage(trained, decay=0.9)
    _train_language_model(model, ema.update)
    ema.copy_to(trained)
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink()
    write(
        folder,
        path="adapter",
        format="huggingface",
        libraries=["peft", "transformers", "torch-ema"],
        averages={"average": get_peft_model_state_dict(model, save_embedding_layers=False)},
    )


@case("trl-bema")
def trl_bema(folder: Path) -> None:
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import BEMACallback

    class Tokens(Dataset):
        def __init__(self) -> None:
            self.tokens = torch.randint(0, 11, (12, 5), generator=torch.Generator().manual_seed(1))

        def __len__(self) -> int:
            return len(self.tokens)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": self.tokens[index], "labels": self.tokens[index]}

    model = _language_model(tied=True)
    callback = BEMACallback(update_freq=1, lag=1, ema_power=0.5)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=2,
            num_train_epochs=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=0.01,
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Tokens(), callbacks=[callback])
        trainer.train()
        trainer.save_model(str(Path(output) / "checkpoint-6"))
        shutil.copytree(Path(output) / "bema", folder / "bema")
        shutil.copytree(Path(output) / "checkpoint-6", folder / "checkpoint-6")
    shared = {"lm_head.weight": "transformer.wte.weight"}
    average = {key: each for key, each in callback.running_model.state_dict().items() if key not in shared}
    raw = {key: each for key, each in model.state_dict().items() if key not in shared}
    write(
        folder,
        path="bema",
        format="trl-bema",
        libraries=["trl", "transformers"],
        averages={"average": average},
        raw=raw,
        tied=shared,
        raw_path="checkpoint-6",
    )
