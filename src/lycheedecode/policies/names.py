"""Policies by name, as commands take them: a class, and settings of its config.

hybrid              Hybrid(config=config, plan=plan)
hybrid+refresh2     Hybrid(config=replace(config, refresh_every=2), plan=plan)
random:3            RandomRoles(config=config, plan=plan, seed=3)
"""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from ..config import HybridConfig
from ..models.routing import check_plan
from ..models.shape import ModelShape
from ..plan import HeadPlan
from .base import Decoding, Policy, PolicyError
from .duo import Duo
from .full import Full
from .hybrid import Hybrid
from .kascade import Kascade
from .own_topk import OwnTopK
from .paper import Paper
from .quest import Quest
from .random_roles import RandomRoles
from .same_index import SameIndex
from .streaming import Streaming
from .tidaldecode import TidalDecode

CORRECTION_EVERY = 32
"""Tokens between corrections of `+correction` where the config has no number."""
POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "hybrid": Hybrid,
    "paper": Paper,
    "same-index": SameIndex,
    "random": RandomRoles,
    "own-topk": OwnTopK,
    "kascade": Kascade,
    "tidaldecode": TidalDecode,
    "quest": Quest,
    "duo": Duo,
    "streaming": Streaming,
}
_ENDINGS: dict[str, dict[str, Any]] = {
    "correction": {"correction_every": CORRECTION_EVERY},
    "refresh2": {"refresh_every": 2},
    "float8": {"scan_keys": "float8"},
    "int4": {"scan_keys": "int4"},
    "centroid": {"completion": "centroid"},
    "uncompleted": {"completion": "none"},
    "weights8": {"step_weights": "float8"},
}
"""Settings that a name may carry."""
NAMES = (*POLICIES, "full+correction", "full+weights8", *(f"hybrid+{ending}" for ending in _ENDINGS))
"""Any name may carry `+correction` (Cache Correction) and `+weights8` (8-bit weights), what selects also `+refresh2`,
and what follows a head plan `+float8`, `+int4`, `+centroid` and `+uncompleted`; `random` may have a seed, as in
`random:3`."""


def make(
    name: str,
    *,
    shape: ModelShape,
    config: HybridConfig | None = None,
    plan: HeadPlan | None = None,
    coverage: Tensor | None = None,
) -> Decoding:
    """A policy by its name, ready for a model.

    Args:
        name: one of `NAMES`.
        shape: of the model (`ModelShape.of`).
        config: budget, block size, strategy.
        plan: roles and donors, for policies that have them (`needs_plan`).
        coverage: for `kascade`, see there.

    Raises:
        PolicyError: an unknown name, a plan or coverage that is missing, a setting that the policy does not know.
        PlanError: a plan that does not fit the model.
    """
    policy, seed, settings = _parse(name)
    config = config or HybridConfig()
    if "correction_every" in settings:
        settings["correction_every"] = config.correction_every or CORRECTION_EVERY
    elif policy is Full:  # corrections belong to what needs them, unless the name asks
        settings["correction_every"] = 0
    if policy is Full:  # what others are compared with has the model's own weights, unless the name asks
        settings.setdefault("step_weights", "model")
    if policy.needs_plan and plan is None:
        raise PolicyError(f"The policy {name!r} needs a head plan.")
    if policy is Kascade and coverage is None:
        raise PolicyError(f"The policy {name!r} needs the coverage of calibration prompts (identify.donors).")
    if plan is not None:
        check_plan(plan, shape)
    given: dict[str, Any] = {"config": replace(config, **settings), "plan": plan, "coverage": coverage, "seed": seed}
    known = {field.name for field in fields(policy)}
    return policy(**{key: value for key, value in given.items() if key in known}).on(shape)


def check_name(name: str) -> None:
    """Raise `PolicyError` for an unknown name; the message has the near ones and all."""
    _parse(name)


def needs_plan(name: str) -> bool:
    """Whether a policy is made of a plan."""
    return _parse(name)[0].needs_plan


def has_budget(name: str) -> bool:
    """Whether a policy's bytes depend on the budget."""
    return _parse(name)[0].has_budget


def has_blocks(name: str) -> bool:
    """Whether what a policy selects depends on the block size."""
    return _parse(name)[0].has_blocks


def _endings(policy: type[Policy]) -> list[str]:
    """What a policy's name may carry."""
    allowed = {"correction": True, "weights8": True, "refresh2": policy.has_budget}
    return [ending for ending in _ENDINGS if allowed.get(ending, policy.follows_plan)]


def _parse(name: str) -> tuple[type[Policy], int, dict[str, Any]]:
    """The policy, the seed, and the settings that the name carries."""
    bare, *endings = name.split("+")
    base, colon, seed = bare.partition(":")
    known = base in POLICIES and (not colon or (base == "random" and seed.isdecimal()))
    if known and set(endings) <= set(_ENDINGS):
        allowed = _endings(POLICIES[base])
        for ending in (ending for ending in endings if ending not in allowed):
            may = " or ".join(f"+{one}" for one in allowed)
            raise PolicyError(
                f"{name!r} asks for what {base} does not have: after {base} may follow {may}, not +{ending}."
            )
    if not known or not set(endings) <= set(_endings(POLICIES[base])):
        near = get_close_matches(name, NAMES, n=3)
        hint = f": did you mean {' or '.join(near)}?" if near else "."
        raise PolicyError(f"There is no policy {name!r}{hint} There are {', '.join(NAMES)}.")
    settings: dict[str, Any] = {}
    for ending in endings:
        for twice in settings.keys() & _ENDINGS[ending].keys():
            raise PolicyError(f"{name!r} says twice what {twice} is: leave out +{ending} or the one before it.")
        settings |= _ENDINGS[ending]
    return POLICIES[base], int(seed or 0), settings
