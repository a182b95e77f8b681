"""Contrastive losses as inverse optimal transport: a plan between two sides of a batch against the true matching.

Symbols: n samples, C ``(n, n)`` the cost of matching row i with column j, P a plan of mass 1, marginals 1/n,
eps > 0 the weight of the plan's entropy. Everything is in the log domain and in float32 at least. All plans couple the
whole batch, so that every worker computes the loss of all workers' rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from armillary.losses.global_batch import global_rows
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize

# log-kernel (n, m) -> log-plan (n, m)
Solver = Callable[[Tensor], Tensor]


def total_mass(kernel: Tensor) -> Tensor:
    """Log P for the one constraint that P sums to 1; ``kernel = -C/eps``."""
    return kernel - kernel.flatten().logsumexp(dim=0)


def row_masses(kernel: Tensor) -> Tensor:
    """Log P whose rows sum to 1/n."""
    return kernel.log_softmax(dim=1) - math.log(len(kernel))


def both_masses(kernel: Tensor, sweeps: int = 5) -> Tensor:
    """Log P whose rows sum to 1/n and columns to 1/m, by Sinkhorn's sweeps (Cuturi 2013), rows first.

    After few sweeps only the columns' sums are exact.
    """
    for _ in range(sweeps):
        kernel = kernel.log_softmax(dim=1) - math.log(kernel.shape[0])
        kernel = kernel.log_softmax(dim=0) - math.log(kernel.shape[1])
    return kernel


def bounded_columns(kernel: Tensor, low: float, high: float, sweeps: int = 5) -> Tensor:
    """Log P whose rows sum to 1/n and whose columns' sums are held within [low, high].

    A sweep scales the rows, then raises columns below ``low``, then lowers columns above ``high``.
    """
    for _ in range(sweeps):
        kernel = row_masses(kernel)
        kernel = kernel + (math.log(low) - kernel.logsumexp(dim=0)).clamp_min(0)
        kernel = kernel + (math.log(high) - kernel.logsumexp(dim=0)).clamp_max(0)
    return kernel


def soft_masses(kernel: Tensor, strength: float, sweeps: int = 5) -> Tensor:
    """Log P whose marginals are drawn to 1/n by Kullback-Leibler penalties (Chizat et al. 2018, scaling algorithm).

    ``u <- (a / K v)^s``, ``v <- (b / K^T u)^s`` with ``strength`` s = rho/(rho + eps) in [0, 1]; 1 is Sinkhorn's.
    """
    rows, columns = -math.log(kernel.shape[0]), -math.log(kernel.shape[1])
    u, v = kernel.new_zeros(kernel.shape[0]), kernel.new_zeros(kernel.shape[1])
    for _ in range(sweeps):
        u = strength * (rows - (kernel + v).logsumexp(dim=1))
        v = strength * (columns - (kernel + u[:, None]).logsumexp(dim=0))
    return u[:, None] + kernel + v


def fused_gromov(
    cost: Tensor, structure: tuple[Tensor, Tensor], alpha: float, eps: float, solve: Solver, steps: int
) -> Tensor:
    """Log P of the cost ``C - alpha D1 P D2^T``, iterated from the plan of C alone.

    Args:
        cost: C.
        structure: D1, D2 ``(n, n)``: distances within each side.
        alpha: weight >= 0.
        eps: entropic weight.
        solve: the inner problem.
        steps: outer steps.
    """
    plan = solve(-cost / eps)
    for _ in range(steps if alpha else 0):
        plan = solve(-(cost - alpha * structure[0] @ plan.exp() @ structure[1].T) / eps)
    return plan


def matching_loss(log_plan: Tensor) -> Tensor:
    """``KL(I/n || P) = -1/n sum_i log(n P_ii)`` for plans of mass 1."""
    return -(log_plan.diagonal() + math.log(len(log_plan))).mean()


def token_transport(rows: Tensor, columns: Tensor, present: Tensor, eps: float = 0.05, sweeps: int = 20) -> Tensor:
    """Transport costs ``<P, 1 - cos>`` between sets of tokens, for all pairs of sets, by entropic Sinkhorn.

    Args:
        rows: ``(A, T, dim)``, sets of T tokens of mass 1/T each.
        columns: ``(B, L, dim)``, sets of at most L tokens.
        present: ``(B, L)`` bool, which of these there are; mass is shared evenly. A set without any counts all.
        eps: entropic weight; towards 0 the cost is the exact one.
        sweeps: of Sinkhorn, columns first and rows last.

    Returns:
        ``(A, B)``.
    """
    present = present | ~present.any(dim=1, keepdim=True)
    cost = 1 - torch.einsum("atd,bld->abtl", normalize(rows), normalize(columns))
    mass = (present / present.sum(dim=1, keepdim=True)).to(cost.dtype)
    log_mass = mass.clamp_min(torch.finfo(cost.dtype).tiny).log()[None, :, None, :]
    kernel = (-cost / eps).masked_fill(~present[None, :, None, :], -torch.finfo(cost.dtype).max / 4)
    tokens = math.log(rows.shape[1])
    for _ in range(sweeps):
        kernel = kernel - kernel.logsumexp(dim=2, keepdim=True) + log_mass
        kernel = kernel.log_softmax(dim=3) - tokens
    return (kernel.exp() * present[None, :, None, :] * cost).sum(dim=(2, 3))


class InverseTransport(nn.Module):
    """Contrastive learning as inverse optimal transport. Shi et al., ICML 2023, "Understanding and Generalizing ...".

    ``L = KL(I/n || P)`` with P the entropic plan of ``C_ij = -cos(z_i, z'_j)`` under one of three constraints::

        U_1:  P sums to 1;  U_a: rows sum to 1/n, which is InfoNCE at tau = eps;  U_ab: rows and columns sum to 1/n

    With ``uniformity`` lambda, ``lambda KL(Q || P)`` is added, where Q keeps P's diagonal and spreads the rest of each
    row evenly, as a constant.

    Args:
        epsilon: eps > 0.
        constraint: ``U_1``, ``U_a`` or ``U_ab``.
        sweeps: of Sinkhorn, for U_ab.
        uniformity: lambda >= 0.
        gradient: ``unroll`` differentiates the sweeps; ``envelope`` takes ``dL/dcos = (P - I/n)/eps``, which is exact
            for a converged plan.
        gather: over all workers' rows.
    """

    def __init__(
        self,
        epsilon: float = 0.2,
        constraint: str = "U_ab",
        sweeps: int = 5,
        uniformity: float = 0.0,
        gradient: str = "unroll",
        gather: bool = True,
    ) -> None:
        super().__init__()
        check_choice("constraint", constraint, ("U_1", "U_a", "U_ab"))
        check_choice("gradient", gradient, ("unroll", "envelope"))
        self.epsilon, self.constraint, self.sweeps = epsilon, constraint, sweeps
        self.uniformity, self.gradient, self.gather = uniformity, gradient, gather

    def log_plan(self, similarity: Tensor) -> Tensor:
        """Log P of similarities ``(n, n)``."""
        kernel = similarity / self.epsilon
        if self.constraint == "U_ab":
            return both_masses(kernel, self.sweeps)
        return row_masses(kernel) if self.constraint == "U_a" else total_mass(kernel)

    @float32_math
    def forward(self, view1: Tensor, view2: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of views ``(batch, dim)``; ``metrics`` receives ``matching``, ``uniformity``, ``matched_mass``."""
        similarity = _similarity(view1, view2, self.gather)
        log_plan = self.log_plan(similarity)
        matching, uniformity = matching_loss(log_plan), uniformity_penalty(log_plan)
        if metrics is not None:
            metrics.update(matching=matching.detach(), uniformity=uniformity.detach())
            metrics["matched_mass"] = log_plan.diagonal().detach().exp().sum()
        if self.gradient == "envelope":
            plan = log_plan.detach().exp()
            slope = (plan - torch.eye(len(plan), dtype=plan.dtype, device=plan.device) / len(plan)) / self.epsilon
            surrogate = (slope * similarity).sum()
            matching = matching.detach() + surrogate - surrogate.detach()
        return matching + self.uniformity * uniformity if self.uniformity else matching


def uniformity_penalty(log_plan: Tensor) -> Tensor:
    """``KL(Q || P)``, Q the constant plan with P's diagonal and each row's other mass spread evenly."""
    n = len(log_plan)
    plan, own = log_plan.detach().exp(), torch.eye(n, dtype=torch.bool, device=log_plan.device)
    rest = plan.masked_fill(own, 0).sum(dim=1, keepdim=True) / max(n - 1, 1)
    target = torch.where(own, plan, rest)
    penalty: Tensor = (torch.special.xlogy(target, target) - target * log_plan).sum()
    return penalty


class TransportCLIP(nn.Module):
    """CLIP and its relatives by another inner problem. Shi, Fan, Yan, "OT-CLIP", ICML 2024, PMLR 235.

    ``L = -1/n sum_i log(n P_ii)`` with ``C_ij = 1 - cos(u_i, v_j)`` and P by ``variant``: ``clip`` the mean of both
    directions' row-wise plans (CLIP at tau = eps); ``sinkhorn`` both marginals; ``double_bounded`` rows exact, columns
    within [low/n, high/n]; ``fused_gromov`` rows exact, cost ``C - alpha D1 P D2^T`` with cosine distances D in each
    side; ``unbalanced`` that cost and soft marginals.

    Args:
        variant: see above.
        epsilon: eps > 0.
        sweeps: inner sweeps, and outer steps of the Gromov term.
        alpha: weight of the Gromov term, >= 0.
        bounds: low and high, as multiples of 1/n.
        marginal_weight: rho > 0 of ``unbalanced``.
        gather: over all workers' rows.
    """

    VARIANTS = ("clip", "sinkhorn", "double_bounded", "fused_gromov", "unbalanced")

    def __init__(
        self,
        variant: str = "clip",
        epsilon: float = 0.07,
        sweeps: int = 5,
        alpha: float = 0.1,
        bounds: tuple[float, float] = (0.9, 1.1),
        marginal_weight: float = 1.0,
        gather: bool = True,
    ) -> None:
        super().__init__()
        check_choice("variant", variant, self.VARIANTS)
        self.variant, self.epsilon, self.sweeps, self.alpha = variant, epsilon, sweeps, alpha
        self.bounds, self.marginal_weight, self.gather = bounds, marginal_weight, gather

    @float32_math
    def forward(self, images: Tensor, texts: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of ``images (batch, dim)`` and their ``texts``; ``metrics`` receives ``matched_mass``."""
        similarity = _similarity(images, texts, self.gather)
        if self.variant == "clip":
            log_plan = row_masses(similarity / self.epsilon)
            loss = (matching_loss(log_plan) + matching_loss(row_masses(similarity.T / self.epsilon))) / 2
        else:
            log_plan = self.log_plan(1 - similarity, (_distances(images, self.gather), _distances(texts, self.gather)))
            loss = matching_loss(log_plan)
        if metrics is not None:
            metrics["matched_mass"] = log_plan.diagonal().detach().exp().sum()
        return loss

    def log_plan(self, cost: Tensor, structure: tuple[Tensor, Tensor]) -> Tensor:
        """Log P of costs ``(n, n)`` and distances within the sides, for every variant but ``clip``."""
        kernel, n = -cost / self.epsilon, len(cost)
        if self.variant == "sinkhorn":
            return both_masses(kernel, self.sweeps)
        if self.variant == "double_bounded":
            return bounded_columns(kernel, self.bounds[0] / n, self.bounds[1] / n, self.sweeps)
        solve: Solver = row_masses
        if self.variant == "unbalanced":
            strength = self.marginal_weight / (self.marginal_weight + self.epsilon)
            solve = lambda some: soft_masses(some, strength, self.sweeps)  # noqa: E731
        return fused_gromov(cost, structure, self.alpha, self.epsilon, solve, self.sweeps)


class TokenTransport(nn.Module):
    """CLIP's loss on transport costs between images' patches and texts' words (a survey's form of OT-CLIP).

    ``S_ij = -min_P <P, 1 - cos>/temperature`` over plans between the patches of image i and the words of text j; see
    :func:`token_transport`.

    Args:
        temperature: > 0.
        epsilon: entropic weight of the plans, > 0.
        sweeps: of Sinkhorn.
        gather: over all workers' rows.
    """

    def __init__(self, temperature: float = 0.07, epsilon: float = 0.1, sweeps: int = 5, gather: bool = True) -> None:
        super().__init__()
        self.temperature, self.epsilon, self.sweeps, self.gather = temperature, epsilon, sweeps, gather

    @float32_math
    def forward(
        self, patches: Tensor, words: Tensor, present: Tensor, *, metrics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The loss of ``patches (batch, T, dim)`` and ``words (batch, L, dim)``, of which ``present (batch, L)`` count.

        ``metrics`` receives ``positive_cost``, of images and their own texts.
        """
        others, there = global_rows(words, self.gather), global_rows(present.long(), self.gather) > 0
        cost = global_rows(token_transport(patches, others, there, self.epsilon, self.sweeps), self.gather)
        if metrics is not None:
            metrics["positive_cost"] = cost.diagonal().detach().mean()
        own = torch.arange(len(cost), device=cost.device)
        scores = -cost / self.temperature
        return (nn.functional.cross_entropy(scores, own) + nn.functional.cross_entropy(scores.T, own)) / 2


def _similarity(left: Tensor, right: Tensor, gather: bool) -> Tensor:
    """Cosines ``(n, n)`` of all workers' rows."""
    check_embeddings(left)
    if left.shape != right.shape:
        raise ValueError(f"the two sides differ in shape: {tuple(left.shape)} and {tuple(right.shape)}")
    return global_rows(normalize(left), gather) @ global_rows(normalize(right), gather).T


def _distances(rows: Tensor, gather: bool) -> Tensor:
    directions = global_rows(normalize(rows), gather)
    return 1 - directions @ directions.T
