"""A target network: deep Q-learning on a short chain, where the right answer is known.

    python examples/target_network.py

Six states in a row; one step left or right at a time; the last state pays 1 and ends the episode. What a step is
worth is learned from what the next step is worth, and if one network gives both, it chases itself. So the next step is
judged by a target network, which follows the one that is trained (the online network) slowly.
"""

import copy

import torch
from torch import Tensor, nn

import polyak

NUM_STATES = 6
LEFT, RIGHT = 0, 1
DISCOUNT = 0.8
NUM_STEPS = 2000
BATCH_SIZE = 64


def step_chain(states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the next states, the rewards, and whether the episode ends there."""
    following = (states + 2 * actions - 1).clamp(min=0)
    ends = following == NUM_STATES - 1
    return following, ends.float(), ends


def encoded(states: Tensor) -> Tensor:
    return nn.functional.one_hot(states, NUM_STATES).float()


def true_values() -> Tensor:
    """What the best policy earns from each state by each first action: 1, discounted once for each step after it."""
    states = torch.arange(NUM_STATES - 1)
    steps_after = torch.stack([NUM_STATES - 1 - (states - 1).clamp(min=0), NUM_STATES - 2 - states], dim=1)
    return DISCOUNT**steps_after


def main() -> dict[str, float]:
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(NUM_STATES, 32), nn.ReLU(), nn.Linear(32, 2))
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), lr=3e-3)

    for _ in range(NUM_STEPS):
        states = torch.randint(NUM_STATES - 1, (BATCH_SIZE,))
        actions = torch.randint(2, (BATCH_SIZE,))
        following, rewards, ends = step_chain(states, actions)
        worth = rewards + DISCOUNT * ~ends * target(encoded(following)).amax(dim=1)
        values = online(encoded(states)).gather(1, actions.unsqueeze(1)).squeeze(1)
        optimizer.zero_grad()
        nn.functional.mse_loss(values, worth).backward()
        optimizer.step()
        # 0.005 is the share of the online network's weights; others write tau = 0.005, or a decay of 0.995.
        polyak.lerp_(target, online, weight=0.005)

    everywhere = encoded(torch.arange(NUM_STATES - 1))
    with torch.no_grad():
        values, followed = online(everywhere), target(everywhere)
    print("state  right  left   right is worth")
    for state, (left, right) in enumerate(values.tolist()):
        print(f"{state:5}  {right:.3f}  {left:.3f}  {true_values()[state, RIGHT]:.3f}")
    return {
        "states where it goes right": int((values.argmax(dim=1) == RIGHT).sum()),
        "largest error": float((values - true_values()).abs().max()),
        "largest error of the target": float((followed - true_values()).abs().max()),
    }


if __name__ == "__main__":
    print(main())
