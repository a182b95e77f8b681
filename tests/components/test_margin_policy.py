"""Margin policies: Q-values of small problems that can be solved by hand, clipped steps, what is drawn."""

from __future__ import annotations

import pytest
import torch

from armillary.components.margin_policy import Choice, ClippedPolicy, MarginTable, thirds

MARGINS = (0.15, 0.25, 0.35, 0.45)
KEEP, LOWER, RAISE = 0, 1, 2


def learn(table: MarginTable, *seen: tuple[int, int, float, int]) -> None:
    state, action, reward, following = zip(*seen, strict=True)
    table.learn(torch.tensor(state), torch.tensor(action), torch.tensor(reward), torch.tensor(following))


def test_bellman_target() -> None:
    """The catalog's step: r = 0.5, gamma = 0.9, next values 0.2, -0.1, 0.4 give 0.86."""
    table = MarginTable(MARGINS, 0.9)
    learn(table, (0, RAISE, 0.5, 1), (1, KEEP, 0.2, 2), (1, LOWER, -0.1, 2), (1, RAISE, 0.4, 2))
    assert float(table.q[0, RAISE]) == pytest.approx(0.86, abs=1e-5)
    assert table.best(torch.tensor([0, 1, 5])).tolist() == [RAISE, RAISE, KEEP]


def test_means_over_transitions() -> None:
    """Rewards and next states of one pair are averaged, over calls too; a loop is worth r / (1 - gamma)."""
    table = MarginTable(MARGINS, 0.5)
    learn(table, (0, LOWER, 1.0, 1), (0, LOWER, 3.0, 2))
    learn(table, (1, KEEP, 4.0, 1), (2, KEEP, -1.0, 2))
    assert float(table.q[1, KEEP]) == pytest.approx(8.0, abs=1e-4)
    # State 2 stays worth 0: what was never tried is worth nothing, and better than its loss.
    assert float(table.q[0, LOWER]) == pytest.approx(2 + 0.5 * (8 + 0) / 2, abs=1e-4)


def test_states_and_moves() -> None:
    table = MarginTable(MARGINS, 0.9)
    bins = torch.arange(3).repeat_interleave(12), torch.arange(3).repeat_interleave(4).repeat(3)
    level = torch.arange(4).repeat(9)
    assert table.state(*bins, level).tolist() == list(range(36))
    for action, expected in ((KEEP, [0, 1, 2, 3]), (LOWER, [0, 0, 1, 2]), (RAISE, [1, 2, 3, 3])):
        assert table.moved(torch.arange(4), torch.full((4,), action)).tolist() == expected


def test_thirds() -> None:
    assert thirds(torch.arange(9)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert thirds(torch.full((5,), 7.0)).tolist() == [0] * 5


def test_drawn_levels_follow_the_policy() -> None:
    torch.manual_seed(0)
    policy = ClippedPolicy(4000, 3, MARGINS, 0.2)
    states, classes = torch.randn(1, 3).expand(4000, 3), torch.arange(4000)
    choice = policy(states, classes, 5)
    chance = policy.scores(states[0]).softmax(0)
    share = torch.bincount(choice.level, minlength=4) / 4000
    torch.testing.assert_close(share, chance.detach(), atol=0.03, rtol=0)
    assert torch.equal(choice.level, policy(states, classes, 5).level)
    assert not torch.equal(choice.level, policy(states, classes, 6).level)
    torch.testing.assert_close(choice.log_chance, chance.log()[choice.level])


@pytest.mark.parametrize(("gain", "rises"), [(1.0, True), (-1.0, False)])
def test_rewarded_choices_become_likelier(gain: float, rises: bool) -> None:
    """A class whose loss fell makes its last margin likelier, until the ratio leaves the clip."""
    torch.manual_seed(1)
    policy = ClippedPolicy(2, 3, MARGINS, 0.2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    states, classes = torch.randn(1, 3), torch.tensor([1])
    choice: Choice = policy(states, classes, 0)
    policy.remember(classes, states, choice, torch.tensor([2.0]))
    for _ in range(40):
        optimizer.zero_grad()
        again = policy(states, classes, 0).again
        policy.surrogate(classes, again, torch.tensor([2.0 - gain])).backward()
        optimizer.step()
    ratio = float((policy(states, classes, 0).again - choice.log_chance).exp().detach())
    assert ratio == pytest.approx(1.2 if rises else 0.8, abs=0.06)


def test_unseen_classes_teach_nothing() -> None:
    policy = ClippedPolicy(3, 3, MARGINS, 0.2)
    classes = torch.tensor([0, 2])
    choice = policy(torch.randn(2, 3), classes, 0)
    assert float(policy.surrogate(classes, choice.again, torch.zeros(2)).detach()) == 0
