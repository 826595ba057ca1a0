"""Averages the weights of a small network while it learns to read handwritten digits.

    python examples/digits.py              # less than a minute; writes runs/digits
    python examples/digits.py --resume     # goes on where an interrupted run stopped

The recipe is of the kind that made weight averaging popular in vision: RMSprop with momentum, a learning rate that
falls in small steps, label smoothing. The raw weights keep jumping about; their averages are steadier and better.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import numpy
import torch
import typer
from digits_plots import plot_curves, plot_profiles
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import polyak

NUM_TRAINING_IMAGES = 900  # of 1797; the others are the test
BATCH_SIZE = 32
STEPS_PER_EPOCH = -(-NUM_TRAINING_IMAGES // BATCH_SIZE)  # rounded up: the last batch of an epoch is a small one

# All are made in one pass over the weights. "power 0.10" is what the library makes by itself: its memory is a fixed
# share of the run so far, so there is no length to choose. Decay 0.9999 is the classic choice for runs of hundreds of
# thousands of steps. This run has 580: see what becomes of it.
PROFILES = {
    "power 0.10": polyak.Power(relative_std=0.10),
    "exponential, half-life 2 epochs": polyak.Exponential(half_life=2 * STEPS_PER_EPOCH),
    "exponential, decay 0.9999": polyak.Exponential(0.9999),
    "uniform": polyak.Uniform(),
}
EXPORTED = "power 0.10"


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns training images, training labels, test images and test labels, always split in the same way."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, test = order[:NUM_TRAINING_IMAGES], order[NUM_TRAINING_IMAGES:]
    return images[training], labels[training], images[test], labels[test]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image by -1, 0 or 1 pixel both ways; what comes in at the edges is background."""
    num_images, _, height, width = images.shape
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    tops, lefts = torch.randint(0, 3, (2, num_images), generator=generator).tolist()
    crops = zip(padded, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in crops])


def convolution(num_inputs: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(num_outputs),  # its running statistics are averaged along with the weights
        nn.ReLU(),
    )


def build_model() -> nn.Sequential:
    return nn.Sequential(
        convolution(1, 16),
        convolution(16, 32),
        nn.MaxPool2d(2),
        convolution(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@torch.no_grad()
def error_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    num_wrong = (model(images).argmax(dim=1) != labels).sum().item()
    return 100 * num_wrong / len(labels)


class Training:
    """The training of one seed: all that changes during it, saved and loaded together."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.model = build_model()
        self.optimizer = torch.optim.RMSprop(self.model.parameters(), lr=0.003, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda epoch: 0.97 ** (epoch // 2.4))
        self.average = polyak.WeightAverage(self.model, PROFILES)
        self.generator = torch.Generator().manual_seed(seed)  # draws the order of the images and their shifts
        self.epoch = 0
        self.errors: dict[str, list[float]] = {name: [] for name in ["raw", *PROFILES]}  # after each epoch
        self.seconds = {"steps": 0.0, "averaging": 0.0}

    def shuffled_batches(self) -> Sequence[Tensor]:
        return torch.randperm(NUM_TRAINING_IMAGES, generator=self.generator).split(BATCH_SIZE)

    def step(self, images: Tensor, labels: Tensor) -> None:
        started = time.perf_counter()
        self.model.train()
        outputs = self.model(shifted(images, self.generator))
        loss = nn.functional.cross_entropy(outputs, labels, label_smoothing=0.1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        stepped = time.perf_counter()
        self.average.update()  # the one line that averaging adds to a training loop
        self.seconds["steps"] += stepped - started
        self.seconds["averaging"] += time.perf_counter() - stepped

    def finish_epoch(self, test_images: Tensor, test_labels: Tensor) -> None:
        self.scheduler.step()
        self.epoch += 1
        self.errors["raw"].append(error_percent(self.model, test_images, test_labels))
        for name in PROFILES:
            with self.average[name].swapped():  # the average stands in the model until the block ends
                self.errors[name].append(error_percent(self.model, test_images, test_labels))

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": self.average.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "errors": self.errors,
            "seconds": self.seconds,
        }
        # Written beside and then renamed: whenever it is interrupted, `path` is a whole file.
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.average.load_state_dict(state["average"])
        self.generator.set_state(state["generator"])
        self.epoch, self.errors, self.seconds = state["epoch"], state["errors"], state["seconds"]


def train(seeds: range, epochs: int, output: Path, resume: bool, console: Console) -> list[Training]:
    images, labels, *test = load_images()
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    trainings = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(seeds) * epochs * STEPS_PER_EPOCH)
        for seed in seeds:
            training = Training(seed)
            path = output / f"seed-{seed}.pt"
            if resume and path.exists():
                training.load(path)
                if training.epoch > epochs:
                    raise typer.BadParameter(f"{path} is at epoch {training.epoch} already", param_hint="--epochs")
                progress.advance(bar, training.epoch * STEPS_PER_EPOCH)
            while training.epoch < epochs:
                progress.update(bar, description=f"seed {seed}, epoch {training.epoch + 1:2}")
                for batch in training.shuffled_batches():
                    training.step(images[batch], labels[batch])
                    progress.advance(bar)
                training.finish_epoch(*test)
                training.save(path)
            trainings.append(training)
    return trainings


def export(training: Training, path: Path) -> str:
    """Writes one average for others to load, and does what they would: load it into a new model and use it."""
    training.average[EXPORTED].export(path)
    model = build_model()
    model.load_state_dict(load_file(path), strict=True)
    _, _, *test = load_images()
    error = error_percent(model, *test)
    expected = training.errors[EXPORTED][-1]
    if error != expected:
        raise RuntimeError(f"the average had an error of {expected} %, what was loaded from {path} has {error} %")
    return f"{path} loads strictly into a new model and has the same error, {error:.2f} %"


def results_table(trainings: list[Training]) -> Table:
    table = Table("weights", title="Test error after the last epoch")
    table.add_column("mean", justify="right")
    table.add_column("standard deviation", justify="right")
    for name in trainings[0].errors:
        finals = [training.errors[name][-1] for training in trainings]
        deviation = f"{stdev(finals):.2f} %" if len(finals) > 1 else "(one seed)"
        table.add_row(name, f"{mean(finals):.2f} %", deviation)
    return table


def cost(trainings: list[Training]) -> str:
    steps = sum(training.seconds["steps"] for training in trainings)
    averaging = sum(training.seconds["averaging"] for training in trainings)
    num_updates = sum(training.epoch * STEPS_PER_EPOCH for training in trainings)
    return (
        f"averaging ({len(PROFILES)} averages at once): {1000 * averaging / num_updates:.3f} ms an update, "
        f"{100 * averaging / (steps + averaging):.1f} % of {steps + averaging:.1f} s of training"
    )


def main(
    output: Annotated[Path, typer.Option(help="Folder for the pictures, the export and the states.")] = Path(
        "runs/digits"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to train: 0, 1, and so on.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="How many epochs to train each of them.")] = 20,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the states in the folder.")] = False,
) -> None:
    """Train a small network on handwritten digits, and compare its raw weights with their averages."""
    torch.set_num_threads(1)  # the network is too small for more to help, and any machine has one
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    trainings = train(range(seeds), epochs, output, resume, console)
    steps = range(1, epochs * STEPS_PER_EPOCH + 1)
    errors = {name: numpy.array([training.errors[name] for training in trainings]) for name in trainings[0].errors}
    plot_curves(output / "curves.png", errors)
    plot_profiles(
        output / "profiles.png",
        {name: profile.weights(steps) for name, profile in PROFILES.items()},
        STEPS_PER_EPOCH,
    )
    console.print(results_table(trainings))
    console.print(cost(trainings))
    console.print(export(trainings[-1], output / f"{EXPORTED.replace(' ', '-')}.safetensors"))
    console.print(f"pictures: {output / 'curves.png'}, {output / 'profiles.png'}")


if __name__ == "__main__":
    typer.run(main)
