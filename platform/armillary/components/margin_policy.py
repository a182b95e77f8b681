"""Two policies that choose a class's margin: a Q-table over class states, and a network trained by clipped steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armillary.components.counter import sample_keys, uniforms
from armillary.losses.tensors import float32_math

# Actions as steps on the grid of margins; staying comes first, so that it is taken where all are worth the same.
STEPS = (0, -1, 1)
BINS = 3


def thirds(values: Tensor) -> Tensor:
    """0, 1 or 2 for each of ``values (n,)``: which third of them it is in; equal values share a bin."""
    edges = torch.quantile(values.double(), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64, device=values.device))
    return (values.double()[:, None] > edges).sum(dim=1)


class MarginTable(nn.Module):
    """Q-learning over (image count bin, spread bin, margin) x (lower, keep, raise), on all that was ever seen.

    ``Q(S, a) = mean over seen (S, a, r, S') of r + gamma max_a' Q(S', a')``, which minimises the squared Bellman error;
    pairs never seen are worth 0. Buffers only: checkpoints carry it, every worker holds the same.

    Args:
        margins: the grid, ascending.
        discount: gamma, in [0, 1).

    Attributes:
        q: ``(states, 3)``, columns as :data:`STEPS`.
    """

    grid: Tensor
    q: Tensor
    visits: Tensor
    rewards: Tensor
    arrivals: Tensor

    def __init__(self, margins: Sequence[float], discount: float) -> None:
        super().__init__()
        self.discount = discount
        states = BINS * BINS * len(margins)
        self.register_buffer("grid", torch.tensor(margins))
        self.register_buffer("q", torch.zeros(states, len(STEPS)))
        self.register_buffer("visits", torch.zeros(states, len(STEPS)))
        self.register_buffer("rewards", torch.zeros(states, len(STEPS)))
        self.register_buffer("arrivals", torch.zeros(states, len(STEPS), states))

    def state(self, count_bin: Tensor, spread_bin: Tensor, level: Tensor) -> Tensor:
        """The state's number, 0 to 35 with four margins; all ``(n,)`` int64, bins in 0..2, level on the grid."""
        return (count_bin * BINS + spread_bin) * len(self.grid) + level

    def moved(self, level: Tensor, action: Tensor) -> Tensor:
        """The level on the grid after an action; it never leaves the grid."""
        step = torch.tensor(STEPS, device=level.device)[action]
        return (level + step).clamp(0, len(self.grid) - 1)

    @torch.no_grad()
    def learn(self, state: Tensor, action: Tensor, reward: Tensor, following: Tensor) -> None:
        """Takes in transitions ``(n,)`` each, and solves for Q."""
        once = torch.ones_like(reward, dtype=self.visits.dtype)
        self.visits.index_put_((state, action), once, accumulate=True)
        self.rewards.index_put_((state, action), reward.to(self.rewards.dtype), accumulate=True)
        self.arrivals.index_put_((state, action, following), once, accumulate=True)
        count = self.visits.clamp_min(1)
        mean_reward, chance = self.rewards / count, self.arrivals / count[..., None]
        # A contraction by gamma: this many rounds take any error below 1e-6 of itself.
        rounds = math.ceil(math.log(1e-6) / math.log(self.discount)) if self.discount else 1
        for _ in range(rounds):
            self.q.copy_(mean_reward + self.discount * chance @ self.q.amax(dim=1))

    def best(self, state: Tensor) -> Tensor:
        """The action worth most in each state, ``(n,)``; of equals staying."""
        values = self.q[state]
        return torch.where(values[:, 0] >= values.amax(dim=1), 0, values.argmax(dim=1))


@dataclass(frozen=True)
class Choice:
    """What a policy chose for ``n`` classes.

    ``level (n,)`` on the grid; ``log_chance (n,)`` of it; ``again (n,)``, the log-probability that the policy gives
    today to each class's last choice, with gradient; ``entropy``, the mean over classes, a scalar with gradient.
    """

    level: Tensor
    log_chance: Tensor
    again: Tensor
    entropy: Tensor


class ClippedPolicy(nn.Module):
    """A linear policy over margins by class, trained on what its last choice did (Schulman et al., "PPO", 2017, eq. 7).

    A class's state is its mean direction in the batch; its reward is by how much its loss without margin fell from the
    time its margin was chosen to its next appearance. The policy that chose is remembered by its probability. State,
    choice, probability and loss of each class's last appearance are buffers, ``classes x dim`` in size, the same on
    every worker.

    Args:
        num_classes: C.
        dim: width of a state.
        margins: what is chosen from.
        clip: largest change of a probability ratio that is rewarded.
    """

    grid: Tensor
    last_state: Tensor
    last_choice: Tensor
    last_log_chance: Tensor
    last_loss: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, dim: int, margins: Sequence[float], clip: float) -> None:
        super().__init__()
        self.clip = clip
        self.scores = nn.Linear(dim, len(margins))
        self.register_buffer("grid", torch.tensor(margins))
        self.register_buffer("last_state", torch.zeros(num_classes, dim))
        self.register_buffer("last_choice", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("last_log_chance", torch.zeros(num_classes))
        self.register_buffer("last_loss", torch.zeros(num_classes))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, states: Tensor, classes: Tensor, base: int) -> Choice:
        """Draws a margin for each class.

        Args:
            states: ``(n, dim)``.
            classes: ``(n,)`` their numbers.
            base: of the draw, from :func:`armillary.components.counter.key`.
        """
        log_chances = self._log_chances(states)
        draws = uniforms(sample_keys(base, classes), 1).to(log_chances.dtype)
        level = (log_chances.detach().exp().cumsum(dim=1) < draws).sum(dim=1).clamp_max(len(self.grid) - 1)
        before = self._log_chances(self.last_state[classes].to(log_chances.dtype))
        return Choice(
            level,
            log_chances.gather(1, level[:, None]).squeeze(1),
            before.gather(1, self.last_choice[classes][:, None]).squeeze(1),
            -(log_chances.exp() * log_chances).sum(dim=1).mean(),
        )

    @float32_math
    def _log_chances(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.scores.weight, self.scores.bias).log_softmax(dim=1)

    def surrogate(self, classes: Tensor, again: Tensor, loss_now: Tensor) -> Tensor:
        """``-mean min(rho A, clip(rho) A)`` over classes seen before, A the fall of their loss; 0 without any."""
        known = self.seen[classes].to(again.dtype)
        ratio = (again - self.last_log_chance[classes].to(again.dtype)).exp()
        gain = self.last_loss[classes].to(again.dtype) - loss_now
        worth = torch.minimum(ratio * gain, ratio.clamp(1 - self.clip, 1 + self.clip) * gain)
        return -(known * worth).sum() / known.sum().clamp_min(1)

    @torch.no_grad()
    def remember(self, classes: Tensor, states: Tensor, choice: Choice, loss_now: Tensor) -> None:
        """Keeps what was chosen for these classes."""
        self.last_state[classes] = states.to(self.last_state.dtype)
        self.last_choice[classes] = choice.level
        self.last_log_chance[classes] = choice.log_chance.to(self.last_log_chance.dtype)
        self.last_loss[classes] = loss_now.to(self.last_loss.dtype)
        self.seen[classes] = True
