"""A mean teacher: two half moons, four labels, and 500 points that have none.

    python examples/mean_teacher.py

The student learns from the labels, and to agree with its teacher where there are none, each looking at the points
through noise of its own. The teacher is the student's average, as a module that follows each update by itself.

Source: Tarvainen and Valpola, Mean teachers are better role models, 2017.
"""

import copy

import torch
from torch import Tensor, nn

import polyak

NUM_STEPS = 600
NOISE = 0.15


def two_moons(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Returns points of two interleaved half circles, in turn, and which of the two each belongs to."""
    labels = torch.arange(len(angles)) % 2
    upper = torch.stack([angles.cos(), angles.sin()], dim=1)
    points = torch.where(labels.unsqueeze(1) == 0, upper, torch.tensor([1.0, 0.5]) - upper)
    return points + 0.08 * torch.randn_like(points), labels


def noisy(points: Tensor) -> Tensor:
    return points + NOISE * torch.randn_like(points)


@torch.no_grad()
def error_percent(model: nn.Module, points: Tensor, labels: Tensor) -> float:
    return 100 * (model(points).argmax(dim=1) != labels).float().mean().item()


def train(student: nn.Module, labelled: tuple[Tensor, Tensor], unlabelled: Tensor, *, consistency: float) -> nn.Module:
    """Trains a student; returns its teacher."""
    average = polyak.WeightAverage(student, polyak.Exponential(0.97))
    teacher = average.live_module()  # its tensors are the average's own: each update reaches it, and nothing is copied
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    points, labels = labelled
    for step in range(NUM_STEPS):
        loss = nn.functional.cross_entropy(student(noisy(points)), labels)
        with torch.no_grad():
            believed = teacher(noisy(unlabelled)).softmax(dim=1)
        agreement = nn.functional.mse_loss(student(noisy(unlabelled)).softmax(dim=1), believed)
        ramp = min(1.0, step / 200)  # at first the teacher knows nothing
        optimizer.zero_grad()
        (loss + ramp * consistency * agreement).backward()
        optimizer.step()
        average.update()
    return teacher


def main() -> dict[str, float]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    alone = copy.deepcopy(student)
    labelled = two_moons(torch.tensor([0.25, 0.25, 0.75, 0.75]) * torch.pi)
    unlabelled, _ = two_moons(torch.rand(500) * torch.pi)
    test = two_moons(torch.rand(2000) * torch.pi)
    train(alone, labelled, unlabelled, consistency=0.0)
    teacher = train(student, labelled, unlabelled, consistency=20.0)
    errors = {
        "labels alone": error_percent(alone, *test),
        "student": error_percent(student, *test),
        "teacher": error_percent(teacher, *test),
    }
    for name, error in errors.items():
        print(f"{name:12}  {error:5.1f} % wrong")
    return errors


if __name__ == "__main__":
    main()
