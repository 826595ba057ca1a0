"""Pre-trains a small language model that FSDP2 shards over several processes, and averages its weights.

    torchrun --nproc-per-node=4 examples/fsdp2_pretrain.py               # less than a minute; writes runs/fsdp2
    torchrun --nproc-per-node=2 examples/fsdp2_pretrain.py --steps 160 --resume   # goes on, here on two ranks
    torchrun --nproc-per-node=4 examples/fsdp2_pretrain.py --shard-over 2 --output runs/hsdp  # replicas share averages

It runs on GPUs where there are any, one for each rank, and otherwise on CPUs. The text is the part of Python's manual
that comes with Python. The learning rate stays high, as it does through most of a long run, so that the raw weights
keep jumping about; see what their averages are worth meanwhile.
"""

import gc
import hashlib
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polyak

WIDTH, NUM_HEADS, NUM_BLOCKS = 96, 4, 2
LENGTH = 64  # of a sequence, in bytes
BATCH_SIZE = 8  # of all ranks together
LEARNING_RATE, NUM_WARMUP_STEPS = 8e-3, 10
PROFILES = {"power": polyak.Power(relative_std=0.10), "ema": polyak.Exponential(half_life=5)}
EXPORTED = "power"


def rotated(heads: Tensor) -> Tensor:
    """Rotates pairs of features by angles that grow with the position (rotary embeddings)."""
    _, _, length, size = heads.shape
    frequencies = 10_000.0 ** -(torch.arange(0, size, 2, device=heads.device) / size)
    angles = torch.outer(torch.arange(length, device=heads.device), frequencies)
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    """Attention, then a gated layer (SwiGLU)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_norm = nn.RMSNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        projected = self.query_key_value(self.attention_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for part in projected)
        mixed = nn.functional.scaled_dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        hidden = hidden + self.output(mixed.transpose(1, 2).flatten(2))
        normal = self.mlp_norm(hidden)
        return hidden + self.down(nn.functional.silu(self.gate(normal)) * self.up(normal))


class Decoder(nn.Module):
    """A small Llama over bytes, whose head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, sequences: Tensor) -> Tensor:
        """Returns the mean loss of predicting each byte of sequences from those before it."""
        hidden = self.embedding(sequences[:, :-1])
        for block in self.blocks:
            hidden = block(hidden)
        scores = self.head(self.norm(hidden))
        return nn.functional.cross_entropy(scores.flatten(0, 1), sequences[:, 1:].flatten())


def load_text() -> tuple[Tensor, Tensor]:
    """Returns bytes to train on, and those of other topics to test with."""
    text = "".join(topics[name] for name in sorted(topics)).encode()
    tokens = torch.tensor(list(text))
    return tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]


def sequences_at(tokens: Tensor, starts: Tensor, device: torch.device) -> Tensor:
    """The sequences that begin there; of all that are given to every rank, this one's share."""
    mine = starts[distributed.get_rank() :: distributed.get_world_size()]
    return tokens[mine.unsqueeze(1) + torch.arange(LENGTH + 1)].to(device)


def mean_of_ranks(loss: Tensor) -> float:
    total = loss.detach().clone()
    distributed.all_reduce(total)
    return total.item() / distributed.get_world_size()


class Training:
    """All that changes during the training, saved and loaded together."""

    def __init__(self, device: torch.device, num_replicas: int) -> None:
        torch.manual_seed(0)  # the same weights on every rank, of which each keeps its part
        self.device = device
        self.model = Decoder().to(device)
        shape = (num_replicas, distributed.get_world_size() // num_replicas)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        mesh = mesh if num_replicas > 1 else mesh["shard"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
        # After sharding, of the parts that are here; where several ranks have the same part, they divide its averages.
        over = mesh["replicate"] if num_replicas > 1 else None
        self.average = polyak.WeightAverage(self.model, PROFILES, shard_over=over)
        self.num_steps = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        average = self.average.state_dict()
        return {"model": model, "optimizer": optimizer, "average": average, "step": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.num_steps = state["step"]

    def save(self, output: Path) -> str:
        name = f"step-{self.num_steps}"
        checkpoint.save(self.state_dict(), checkpoint_id=output / name)
        if distributed.get_rank() == 0:
            (output / "latest").write_text(name)  # after the checkpoint is whole
        return name

    def load(self, output: Path) -> str:
        name = (output / "latest").read_text()
        state = self.state_dict()  # says what is wanted, and where it belongs on these ranks
        checkpoint.load(state, checkpoint_id=output / name)
        self.load_state_dict(state)
        return name

    def step(self, tokens: Tensor) -> Tensor:
        # What is drawn is a function of the step, so that it is the same on any number of ranks, and after a resume.
        generator = torch.Generator().manual_seed(self.num_steps)
        starts = torch.randint(len(tokens) - LENGTH, (BATCH_SIZE,), generator=generator)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (self.num_steps + 1) / NUM_WARMUP_STEPS)
        loss = self.model(sequences_at(tokens, starts, self.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()  # sends nothing: each rank averages its own part
        self.num_steps += 1
        return loss

    @torch.no_grad()
    def test_losses(self, tokens: Tensor) -> dict[str, float]:
        """The loss of the raw weights and of each average; all ranks take part."""
        starts = torch.linspace(0, len(tokens) - LENGTH - 1, 8 * BATCH_SIZE).long()
        sequences = sequences_at(tokens, starts, self.device)
        losses = {"raw": mean_of_ranks(self.model(sequences))}
        for name in PROFILES:
            with self.average[name].swapped():
                losses[name] = mean_of_ranks(self.model(sequences))
        return losses

    def digest(self) -> str:
        """Of all bits of the averages, whole, whatever the number of ranks; all of them must ask for it."""
        digest = hashlib.blake2b(digest_size=8)
        for name in PROFILES:
            for tensor in self.average[name].weights().values():
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def main(
    output: Annotated[Path, typer.Option(help="Folder for the checkpoints and the export.")] = Path("runs/fsdp2"),
    steps: Annotated[int, typer.Option(min=1, help="How many steps to train in all.")] = 100,
    save_every: Annotated[int, typer.Option(min=1, help="Save and test after so many steps.")] = 25,
    shard_over: Annotated[int, typer.Option(min=1, help="Replicas of the model, which share its averages.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint in the folder.")] = False,
) -> None:
    """Train a small language model over the ranks that torchrun starts, and compare its weights with averages."""
    if "RANK" not in os.environ:
        raise SystemExit("start it by torchrun, as in: torchrun --nproc-per-node=4 examples/fsdp2_pretrain.py")
    if resume and not (output / "latest").exists():
        raise SystemExit(f"--resume: there is no checkpoint in {output}; leave it out, or say where with --output")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    num_ranks = distributed.get_world_size()
    if BATCH_SIZE % num_ranks:
        raise SystemExit(f"{num_ranks} ranks cannot share batches of {BATCH_SIZE} equally")
    if num_ranks % shard_over:
        raise SystemExit(f"{num_ranks} ranks cannot hold {shard_over} replicas of the model")
    console = Console(quiet=distributed.get_rank() != 0, soft_wrap=True)
    output.mkdir(parents=True, exist_ok=True)
    train_tokens, test_tokens = load_text()
    training = Training(device, shard_over)
    if resume:
        console.print(f"resumed {training.load(output)} on {num_ranks} ranks, averages {training.digest()}")
    num_parameters = sum(parameter.numel() for parameter in training.model.parameters())
    num_bytes = training.average.report().num_bytes
    console.print(
        f"{num_parameters:,} parameters, {num_ranks} ranks, {device.type}, {num_bytes:,} bytes of averages each"
    )
    while training.num_steps < steps:
        loss = training.step(train_tokens)
        if training.num_steps % save_every == 0 or training.num_steps == steps:
            shown = {"training": mean_of_ranks(loss), **training.test_losses(test_tokens)}
            losses = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            console.print(f"{training.save(output):>8}  {losses}  averages {training.digest()}")
    path = output / f"{EXPORTED}.safetensors"
    training.average[EXPORTED].export(path)  # every rank takes part, one writes
    console.print(f"{path}: the average {EXPORTED!r}, whole")
    # A thread of the process group that gives back what was sent last, when Python has ended, would abort the process.
    distributed.barrier()
    distributed.destroy_process_group()
    del training
    gc.collect()


if __name__ == "__main__":
    typer.run(main)
