"""Hybrid attention inside vLLM: a plugin of its attention backends. See docs/serving.md.

settings    what the server was told, checked
requests    options of a request for its attention
parts       everything that is taken from vLLM, and the versions it was seen in
frontend    what the process does that starts an engine: refuse early, refuse requests, show counters
group       the layers of a KV-cache group that use hybrid attention, and what they share
rows        which rows of a step do what
backend     the hooks into vLLM's attention: metadata of a step, one layer of it
self_check  compares a hybrid step with vLLM's own before accepting requests
counters    from workers to the server's metrics
cuda, cpu   the hooks over vLLM's own backends
beside      data kept beside the pages: means of chunks, copies of scanned keys
verify      drafts, several tokens of a sequence at once
lossless    the model drafts for itself, hybrid, and verifies with full attention
drafter_v1  what vLLM's first model runner asks of that
drafter_v2  what the second one does
fill        a KV connector for `bench serving`
wrap        replaces methods of vLLM's classes, once
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from .wrap import wrap


def register() -> None:
    """Entry point of `vllm.general_plugins`; vLLM calls it in every process, perhaps more than once.

    Servers that do not ask for the backend CUSTOM are left as they are, whatever version of vLLM they run.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    device = "cpu" if current_platform.is_cpu() else "cuda"
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{device}.HybridBackend")
    if device == "cpu":
        _let_cpus_have_it(type(current_platform), AttentionBackendEnum)
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is not None:  # else this process starts no engine
        _prepare_engines(arguments.EngineArgs)


def _let_cpus_have_it(platform: type, backends: type) -> None:
    """vLLM's platform for CPUs has one backend for all models; let it accept CUSTOM where that is asked for."""
    stock = platform.get_attn_backend_cls
    if getattr(stock, "knows_custom", False):
        return

    def get_attn_backend_cls(selected_backend: Any, attn_selector_config: Any, *others: Any, **named: Any) -> str:
        plain = not (attn_selector_config.use_mla or attn_selector_config.use_sparse)
        if selected_backend is backends.CUSTOM and plain:
            return backends.CUSTOM.get_path()
        return stock(selected_backend, attn_selector_config, *others, **named)

    get_attn_backend_cls.knows_custom = True
    platform.get_attn_backend_cls = staticmethod(get_attn_backend_cls)


def _prepare_engines(arguments: type) -> None:
    """Once arguments have become a configuration that asks for CUSTOM, see `frontend.prepare`."""
    wrap(arguments, "create_engine_config", _preparing)


def _preparing(stock: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *others: Any, **named: Any) -> Any:
        from . import settings

        ready = contextlib.nullcontext()
        if settings.drafts(self):
            from . import frontend

            ready = frontend.drafting(self)
        with ready:
            vllm_config = stock(self, *others, **named)
        if settings.is_chosen(vllm_config):
            from . import frontend

            frontend.prepare(vllm_config)
        return vllm_config

    return create_engine_config
