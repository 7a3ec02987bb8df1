"""Gates: a random variable z in [0, 1] for every (layer, KV head), near 1 for a head that must look for itself.

HardKuma      stretched and rectified Kumaraswamy (Bastings et al. 2019): mass at exactly 0 and 1, and a density
              between them, all in closed form. The paper's choice.
HardConcrete  the same construction over a logistic variable (Louizos et al. 2018).
Direct        no randomness: z is a clamped weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SUPPORT = (-0.1, 1.1)
"""The stretched interval; what falls outside [0, 1] is rectified to exactly 0 or 1."""
_LEAST, _MOST = 1e-6, 100.0


class HardKuma(nn.Module):
    """s = (1 - (1 - u)^(1/b))^(1/a) for u ~ U(0, 1), stretched to `SUPPORT` and clamped to [0, 1]."""

    def __init__(self, num_layers: int, num_kv_heads: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(num_layers, num_kv_heads))
        self.b = nn.Parameter(torch.ones(num_layers, num_kv_heads))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One z for every head, `[L, Hkv]`, differentiable in the parameters."""
        noise = torch.rand(self.a.shape, generator=generator).clamp_(_LEAST, 1 - _LEAST).to(self.a)
        s = (1 - (1 - noise) ** (1 / self.b)).clamp_min(_LEAST) ** (1 / self.a)
        return _rectify(s)

    def open_probability(self) -> Tensor:
        """P(z != 0), `[L, Hkv]`."""
        return 1 - self._cdf(torch.tensor(0.0))

    def mean(self) -> Tensor:
        """E[z] = integral of P(z > x) over [0, 1], `[L, Hkv]`."""
        x = (torch.arange(256, device=self.a.device) + 0.5) / 256
        return (1 - self._cdf(x[:, None, None])).mean(0)

    def constrain(self) -> None:
        """Keep the parameters in their domain; call after every optimiser step."""
        with torch.no_grad():
            self.a.clamp_(_LEAST, _MOST)
            self.b.clamp_(_LEAST, _MOST)

    def _cdf(self, z: Tensor) -> Tensor:
        low, high = SUPPORT
        s = ((z - low) / (high - low)).to(self.a.device)
        return 1 - (1 - s**self.a) ** self.b


class HardConcrete(nn.Module):
    """s = sigmoid((logit(u) + log_alpha) / temperature), stretched and clamped like HardKuma."""

    temperature = 2 / 3

    def __init__(self, num_layers: int, num_kv_heads: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(num_layers, num_kv_heads))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.rand(self.log_alpha.shape, generator=generator).clamp_(_LEAST, 1 - _LEAST).to(self.log_alpha)
        return _rectify(torch.sigmoid((torch.logit(noise) + self.log_alpha) / self.temperature))

    def open_probability(self) -> Tensor:
        return self._survival(torch.tensor(0.0))

    def mean(self) -> Tensor:
        x = (torch.arange(256, device=self.log_alpha.device) + 0.5) / 256
        return self._survival(x[:, None, None]).mean(0)

    def constrain(self) -> None:
        with torch.no_grad():
            self.log_alpha.clamp_(-20, 20)

    def _survival(self, z: Tensor) -> Tensor:
        low, high = SUPPORT
        s = ((z - low) / (high - low)).to(self.log_alpha.device)
        return torch.sigmoid(self.log_alpha - self.temperature * torch.logit(s))


class Direct(nn.Module):
    """z is a weight, clamped to [0, 1] after every step; its size stands for the probability of being open."""

    def __init__(self, num_layers: int, num_kv_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_layers, num_kv_heads), 0.5))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.weight

    def open_probability(self) -> Tensor:
        return self.weight

    def mean(self) -> Tensor:
        return self.weight.detach()

    def constrain(self) -> None:
        with torch.no_grad():
            self.weight.clamp_(0, 1)


def _rectify(s: Tensor) -> Tensor:
    low, high = SUPPORT
    return (low + (high - low) * s).clamp(0, 1)


GATES: dict[str, type[HardKuma] | type[HardConcrete] | type[Direct]] = {
    "hardkuma": HardKuma,
    "hardconcrete": HardConcrete,
    "direct": Direct,
}
