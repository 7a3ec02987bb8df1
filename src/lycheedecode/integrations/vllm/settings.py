"""What a server was told: `--additional-config '{"lycheedecode": {"plan": ..., any setting of HybridConfig}}'`.

Beside these: `self_check`, `lossless`, and for requests (see `requests`) `max_budget_tokens` and `allow_off`.

Nothing here needs vLLM; its configuration is only read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config import HybridConfig
from ...ops.attend import MAX_TOKENS
from ...plan import HeadPlan, PlanError
from ...roles import check_budgets
from .requests import NAME, Limits, ServingError

OLDEST, NEWEST = (0, 26), (0, 33)

FLOAT8 = ("fp8", "fp8_e4m3")
"""vLLM's names for caches in float8_e4m3fn."""


def check_version(version: str) -> None:
    """Raise `ServingError` for a version of vLLM that the plugin does not know."""
    if not OLDEST <= _parsed(version) <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise ServingError(f"LycheeDecode works in vLLM {oldest} to {newest}, not in {version}.")


def _parsed(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


def is_chosen(config: Any) -> bool:
    """Whether the server was started with `--attention-backend CUSTOM`, for all its layers or for those of a kind.

    `config`: vLLM's configuration, or the arguments that it is going to be made of.
    """
    attention = config.attention_config
    backends = [getattr(config, "attention_backend", None), attention.backend]
    backends += (getattr(attention, "backend_per_kind", None) or {}).values()
    return any(str(getattr(backend, "name", backend)).upper() == "CUSTOM" for backend in backends)


def drafts(config: Any) -> int:
    """How many tokens the model drafts for itself in a round, `"lossless": 8`; 0: the server is not lossless.

    `config`: as for `is_chosen`. Raises `ServingError`.
    """
    everything = getattr(config, "additional_config", None)  # whatever version of vLLM this is
    given = everything.get(NAME) if isinstance(everything, Mapping) else None
    count = given.get("lossless", 0) if isinstance(given, Mapping) and is_chosen(config) else 0
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < MAX_TOKENS:
        raise ServingError(f"lossless must be how many tokens to draft, from 0 to {MAX_TOKENS - 1}, not {count!r}.")
    return count


def check_runner(is_second: bool, version: str) -> None:
    """Raise `ServingError` if a lossless server would run on vLLM's second model runner where that cannot draft.

    Some features of vLLM select it whatever `VLLM_USE_V2_MODEL_RUNNER` says, and a process with another engine may have
    read the variable before it was set.
    """
    if is_second and not drafts_in_v2(version):
        raise ServingError(
            "A lossless server needs vLLM's first model runner before vLLM 0.32: unset VLLM_USE_V2_MODEL_RUNNER."
        )


def drafts_in_v2(version: str) -> bool:
    """Whether the second model runner can draft: 0.27 has no draft models there; versions between were not read."""
    return _parsed(version) >= (0, 32)


@dataclass(frozen=True)
class Settings:
    """What the server was told.

    Attributes:
        plan: of the whole model.
        config: how sequences decode whose request says nothing else.
        self_check: compare a hybrid step with vLLM's own attention before serving.
        limits: what requests may ask for.
    """

    plan: HeadPlan
    config: HybridConfig
    self_check: bool
    limits: Limits

    @property
    def completes(self) -> bool:
        """Whether unread tokens count as their chunk's mean in some head."""
        factors = self.plan.completion or ()
        return self.config.completion == "centroid" or (self.config.completion == "plan" and any(map(any, factors)))

    def announcement(self, hybrid: Collection[int], max_model_len: int) -> str:
        """How many heads of the layers `hybrid` retrieve, and how much of the longest context a selection holds."""
        plan, config = self.plan, self.config
        retrieval = sum(layer in hybrid for layer, _ in plan.retrieval)
        text = f"LycheeDecode: {retrieval} of {len(hybrid) * plan.num_kv_heads} KV heads retrieve"
        if len(hybrid) < plan.num_layers:
            text += f" in {len(hybrid)} of {plan.num_layers} layers"
        budget = "no fixed budget" if config.budget_tokens is None else f"budget {config.budget_tokens}"
        return f"{text}, {budget} of up to {max_model_len} tokens"


def read(vllm_config: Any) -> Settings:
    """Read and check everything that does not depend on ranks.

    Raises:
        ServingError: no plan, or a setting that a server cannot honour.
        PlanError: the plan cannot be read or does not fit the model.
        ConfigError: an unknown setting, a value that makes no sense, or budgets of heads without a budget.
    """
    config, limits, self_check = read_config(vllm_config)
    plan, model = HeadPlan.load(_given(vllm_config)["plan"]), vllm_config.model_config
    # A decoder within a multimodal model goes by the wrapper's name here, and by its own where plans are made.
    is_wrapped = getattr(model, "hf_text_config", model.hf_config) is not model.hf_config
    plan.check_fits(
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        architecture=None if is_wrapped else next(iter(model.hf_config.architectures or ()), None),
    )
    check_budgets(plan, config)
    return Settings(plan, config, self_check, limits)


def read_config(vllm_config: Any) -> tuple[HybridConfig, Limits, bool]:
    """All but the plan: how to decode, what requests may ask for, and whether to check itself first."""
    given = dict(_given(vllm_config))
    del given["plan"]
    self_check, allow_off = (_switch(given, name) for name in ("self_check", "allow_off"))
    most = given.pop("max_budget_tokens", None)
    lossless = drafts(vllm_config) > 0
    given.pop("lossless", None)
    config = HybridConfig.from_dict(given)
    if config.verify_every:
        raise ServingError("verify_every is Engine's: in vLLM a lossless server has the setting lossless, as 8.")
    for name, only in (("refresh_every", 1), ("correction_every", 0)):
        if getattr(config, name) != only:
            raise ServingError(f"{name} must be {only!r} in vLLM, where the sequences of a batch change at every step.")
    if config.scan_keys != "cache" and vllm_config.cache_config.cache_dtype in FLOAT8:
        raise ServingError("scan_keys must be 'cache' with a KV cache in FP8: copies are made of 16-bit keys.")
    if config.step_weights != "model":
        raise ServingError("step_weights must be 'model' in vLLM, which quantises weights itself (--quantization fp8).")
    return config, Limits.of(config, most, allow_off, lossless), self_check


def _given(vllm_config: Any) -> Mapping[str, Any]:
    everything = vllm_config.additional_config
    given = everything.get(NAME) if isinstance(everything, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(given.get("plan"), str):
        example = '{"lycheedecode": {"plan": "my-plan.json"}}'
        raise ServingError(f"The attention backend CUSTOM needs a head plan: --additional-config '{example}'.")
    return given


def _switch(given: dict[str, Any], name: str) -> bool:
    value = given.pop(name, True)
    if not isinstance(value, bool):
        raise ServingError(f"{name} must be true or false, not {value!r}.")
    return value


def check_donors(plan: HeadPlan, hybrid: Collection[int], first_layer: int = 0) -> None:
    """Raise `PlanError` where a head of one of the layers `hybrid` has its donor in another layer."""
    for layer in sorted(hybrid):
        for head, donor in enumerate(plan.donors[layer]):
            if donor[0] not in hybrid:
                raise PlanError(
                    f"The donor {(donor[0] + first_layer, donor[1])} of layer {layer + first_layer}, KV head "
                    f"{head} is in a layer that vLLM decodes with full attention or keeps in another cache group."
                )


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
