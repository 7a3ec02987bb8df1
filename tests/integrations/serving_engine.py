"""vLLM's engine on a CPU, for the tests of the plugin."""

import gc
import os
from contextlib import contextmanager

import pytest
import tiny
import torch

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm has an environment with it.")
if torch.cuda.is_available():
    pytest.skip("These tests are for vLLM's CPU backend.", allow_module_level=True)

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from lycheedecode import Engine, HybridConfig

SETTINGS = {"block_size": 4, "sink_tokens": 4, "recent_tokens": 4}
ROOMY, TIGHT = {"budget_tokens": 512, **SETTINGS}, {"budget_tokens": 16, **SETTINGS}
CROWDED = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "block_size": 32}
"""Long prompts pass in chunks, beside sequences that decode; some sequences have to wait."""


@contextmanager
def serving(folder, plan=None, config=None, **options):
    """vLLM's engine; hybrid with a plan."""
    if plan is not None:
        plan.save(folder / "plan.json")
        more = {"lycheedecode": {"plan": str(folder / "plan.json"), **config}}
        options |= {"attention_backend": "CUSTOM", "additional_config": more}
    defaults = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True}
    llm = None
    try:
        llm = LLM(str(folder), **{**defaults, "disable_log_stats": False, **options})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def generate(llm, prompts, count=12, logprobs=None, asked=()):
    """Token ids of each prompt; with `logprobs`, those of the tokens chosen, too.

    `asked`: what each request says of its attention, nothing where there are fewer.
    """
    asked = [*asked, *[None] * (len(prompts) - len(asked))]
    sampling = [
        SamplingParams(
            max_tokens=count,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
            extra_args=None if given is None else {"lycheedecode": given},
        )
        for given in asked
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    if logprobs is None:
        return tokens
    chosen = [
        [step[token].logprob for step, token in zip(output.outputs[0].logprobs, row, strict=True)]
        for output, row in zip(outputs, tokens, strict=True)
    ]
    return tokens, torch.tensor(chosen)


def groups(llm):
    """The hybrid groups of the (only) worker."""

    def find(worker):
        found = [group for groups in worker.model_runner.attn_groups for group in groups]
        return [getattr(group.get_metadata_builder(), "hybrid", None) for group in found]

    return [group for group in llm.collective_rpc(find)[0] if group is not None]


def ours(family, plan, config, prompts, count=12, **changes):
    """Tokens that Engine chooses, one prompt after the other."""
    engine = Engine(tiny.model(family, head_dim=32, **changes), plan=plan, config=HybridConfig(**config))
    return [list(engine.generate([prompt], count, ignore_eos=True)[0].token_ids) for prompt in prompts]
