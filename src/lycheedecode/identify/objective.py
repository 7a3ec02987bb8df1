"""What identification minimises: distance from the teacher, under a constraint on the number of open gates."""

from __future__ import annotations

from math import exp, isnan, nan

import torch
from torch import Tensor, nn

from ..errors import ConfigError


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of last hidden states `[B, T, E]` over the tokens in `mask` `[B, T]`."""
    return (student.float() - teacher.float())[mask].square().mean()


def logit_loss(student: Tensor, teacher: Tensor, mask: Tensor, head: nn.Module) -> Tensor:
    """Mean KL(teacher || student) in nats over the tokens in `mask`, through the language-model head `head`."""
    return token_kl(student[mask], teacher[mask], head).mean()


def token_kl(student: Tensor, teacher: Tensor, head: nn.Module) -> Tensor:
    """KL(teacher || student) in nats of each token, `[n]`, from hidden states `[n, E]`."""
    expected = head(teacher).float().log_softmax(-1)
    return (expected.exp() * (expected - head(student).float().log_softmax(-1))).sum(-1)


class Lagrangian:
    """Holds the expected share of open gates at a target.

    `one_sided` (the paper): only a density above the target costs. The multiplier grows while it is violated and never
    shrinks, so the density falls through the target and gates freeze before the loss has sorted them.
    `two_sided`: the target comes down linearly over the first `approach` of the steps, and a density on either side of
    it is pulled back: by the multiplier, which follows the violation's sign, and by a quadratic term.
    """

    def __init__(self, target: float, kind: str, *, start: float = 2.0, learning_rate: float = 1e-3) -> None:
        if kind not in ("one_sided", "two_sided"):
            raise ConfigError(f"penalty must be 'one_sided' or 'two_sided', not {kind!r}.")
        self.target = target
        self.kind = kind
        self.multiplier = start if kind == "one_sided" else 0.0
        self.learning_rate = learning_rate
        self.smoothed = nan  # none yet

    def penalty(self, density: Tensor, progress: float, approach: float = 0.6) -> Tensor:
        """Cost of the expected density (a scalar with gradient) at `progress` in [0, 1]; updates the multiplier."""
        if self.kind == "one_sided":
            violation = torch.relu(density - self.target)
            self._smooth(float(violation.detach()))
            cost = self.multiplier * violation
            self.multiplier = min(max(self.multiplier * exp(self.learning_rate * self.smoothed), 1e-12), 20.0)
            return cost
        target = 1 + (self.target - 1) * min(progress / approach, 1.0)
        violation = density - target
        self._smooth(float(violation.detach()))
        cost = self.multiplier * violation + 10.0 * violation.square()
        self.multiplier = min(max(self.multiplier + 0.1 * self.smoothed, -20.0), 20.0)
        return cost

    def _smooth(self, violation: float) -> None:
        self.smoothed = violation if isnan(self.smoothed) else 0.9 * self.smoothed + 0.1 * violation

    def state(self) -> list[float]:
        return [self.multiplier, self.smoothed]

    def restore(self, state: list[float]) -> None:
        self.multiplier, self.smoothed = state
