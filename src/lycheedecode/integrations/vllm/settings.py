"""What a server was told: `--additional-config '{"lycheedecode": {"plan": ..., any setting of HybridConfig}}'`.

Nothing here needs vLLM; its configuration is only read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...config import HybridConfig
from ...errors import LycheeError
from ...plan import HeadPlan

NAME = "lycheedecode"
OLDEST, NEWEST = (0, 26), (0, 33)


class ServingError(LycheeError):
    """A server that cannot decode as it was told to; the message is one sentence."""


def check_version(version: str) -> None:
    """Raise `ServingError` for a version of vLLM that the plugin does not know."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise ServingError(f"LycheeDecode works in vLLM {oldest} to {newest}, not in {version}.")


def is_chosen(vllm_config: Any) -> bool:
    """Whether the server was started with `--attention-backend CUSTOM`, for all its layers or for those of a kind."""
    attention = vllm_config.attention_config
    backends = [attention.backend, *(getattr(attention, "backend_per_kind", None) or {}).values()]
    return any(getattr(backend, "name", None) == "CUSTOM" for backend in backends)


def read(vllm_config: Any) -> tuple[HeadPlan, HybridConfig]:
    """The plan of the whole model, and how to decode.

    Raises:
        ServingError: no plan, or a setting that a server cannot honour.
        PlanError: the plan cannot be read or does not fit the model.
        ValueError: an unknown setting, or a value that makes no sense.
    """
    everything = vllm_config.additional_config
    given = everything.get(NAME) if isinstance(everything, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(given.get("plan"), str):
        example = '{"lycheedecode": {"plan": "my-plan.json"}}'
        raise ServingError(f"The attention backend CUSTOM needs a head plan: --additional-config '{example}'.")
    config = HybridConfig.from_dict({name: value for name, value in given.items() if name != "plan"})
    for name, only in (("refresh_every", 1), ("correction_every", 0), ("scan_keys", "cache")):
        if getattr(config, name) != only:
            raise ServingError(f"{name} must be {only!r} in vLLM, where the sequences of a batch change at every step.")
    if config.completion == "centroid":
        raise ServingError("completion must be 'plan' or 'none' in vLLM, whose pages have no means yet.")
    plan, model = HeadPlan.load(given["plan"]), vllm_config.model_config
    plan.check_fits(
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        architecture=next(iter(model.hf_config.architectures or ()), None),
    )
    if plan.completion is not None and config.completion == "plan":
        warnings.warn("vLLM's pages have no means yet: the head plan's completion is left out.", stacklevel=2)
    return plan, replace(config, completion="none")


def of_rank(plan: HeadPlan, rank: int, world: int, stages: Sequence[tuple[int, int]], stage: int) -> HeadPlan:
    """The part of a plan that one process needs; every process checks all parts, so that all refuse alike.

    Args:
        plan: of the whole model.
        rank, world: of tensor parallelism.
        stages: first layer of every pipeline stage, and the layer after its last.
        stage: which of them this process is.

    Raises:
        PlanError: heads that cannot be divided, or a donor on another rank or in another stage.
    """
    shards = [plan.shard(other, world) for other in range(world)]
    parts = [[shard.stage(first, last) for first, last in stages] for shard in shards]
    return parts[rank][stage]
