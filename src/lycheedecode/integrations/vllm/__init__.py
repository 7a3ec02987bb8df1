"""Hybrid decoding inside vLLM: a plugin of its attention backends. See docs/serving.md.

settings   what the server was told, checked
group      the layers of a KV-cache group that decode hybridly, and what they share
backend    the hooks into vLLM's attention: metadata of a step, one layer of it
cuda, cpu  these hooks over vLLM's own backends
"""


def register() -> None:
    """Entry point of `vllm.general_plugins`; vLLM calls it in every process, perhaps more than once."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.cuda.HybridBackend")
    if current_platform.is_cpu():  # which takes no other backend than its own
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.cpu.HybridBackend")
