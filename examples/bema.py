"""BEMA, an average without the lag: a method of its own, made of two averages.

    python examples/bema.py

    beta = max((rho + gamma * t) ** -kappa, floor)                     the weight of the newest weights
    alpha = (rho + gamma * t) ** -eta
    average = (1 - beta) * average + beta * weights
    bema = average + alpha * (weights - initial)

Up to step `burn_in`, both the average and `initial` are copies of the weights; after it they are updated every `every`
steps, and `initial` stays. This is the form in the paper; the two implementations of its authors count t differently.

Here it descends a noisy quadratic. While the average lags behind, BEMA is ahead of it. Where there is no way left to
go, alpha is what keeps BEMA from the mean; a larger eta makes it vanish sooner.

Source: Block and Zhang, EMA without the lag: bias-corrected iterate averaging schemes, 2025.
"""

import functools

import torch
from torch import Tensor, nn

import polyak


def bema_beta(t: int, *, kappa: float = 0.5, rho: float = 10.0, gamma: float = 1.0, floor: float = 0.0) -> float:
    return max((rho + gamma * t) ** -kappa, floor)


def bema_alpha(t: int, *, eta: float = 0.2, rho: float = 10.0, gamma: float = 1.0) -> float:
    return (rho + gamma * t) ** -eta


# Registered by name, so that what is saved with it can be loaded again. Step 1 is the first update after burn_in.
@polyak.register_schedule("bema")
def bema_decay(step: int, *, every: int, burn_in: int, kappa: float, rho: float, gamma: float, floor: float) -> float:
    return 1 - bema_beta(burn_in + every * step, kappa=kappa, rho=rho, gamma=gamma, floor=floor)


@polyak.register_schedule("stay")
def stay(step: int) -> float:
    return 1.0


class Bema:
    def __init__(self, model: nn.Module, *, every=400, burn_in=0, eta=0.2, kappa=0.5, rho=10.0, gamma=1.0, floor=0.0):
        if burn_in % every:
            raise ValueError(f"burn_in={burn_in} must be a multiple of every={every}")
        beta = polyak.Schedule("bema", every=every, burn_in=burn_in, kappa=kappa, rho=rho, gamma=gamma, floor=floor)
        # Time counts updates here, and up to `start` they copy.
        profiles = {"average": beta, "initial": polyak.Schedule("stay")}
        self.average = polyak.WeightAverage(model, profiles, start=burn_in // every)
        self.alpha = functools.partial(bema_alpha, eta=eta, rho=rho, gamma=gamma)
        self.every, self.t = every, 0

    def update(self) -> None:
        self.t += 1
        if self.t % self.every == 0:
            self.average.update()

    def weights(self) -> dict[str, Tensor]:
        average, initial = self.average["average"].weights(), self.average["initial"].weights()
        raw, alpha = self.average.raw_weights(), self.alpha(self.t)
        return {name: average[name] + alpha * (raw[name] - initial[name]) for name in raw}


def main() -> dict[int, dict[str, float]]:
    torch.manual_seed(0)
    model = nn.Linear(200, 1, bias=False)
    nn.init.normal_(model.weight)  # the optimum is 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    bema = Bema(model, every=10, eta=0.5)
    losses: dict[int, dict[str, float]] = {}
    print("step   raw     average  bema")
    for step in range(1, 401):
        model.weight.grad = model.weight.detach() + 3 * torch.randn(1, 200)
        optimizer.step()
        bema.update()
        if step in (50, 100, 200, 400):
            found = {"raw": model.state_dict(), "average": bema.average["average"].weights(), "bema": bema.weights()}
            losses[step] = {name: weights["weight"].square().mean().item() / 2 for name, weights in found.items()}
            print(f"{step:4}   " + "  ".join(f"{loss:.4f}" for loss in losses[step].values()))
    return losses


if __name__ == "__main__":
    main()
