"""HybridConfig: defaults, refusals in one sentence, and how much a selection may hold."""

from dataclasses import FrozenInstanceError, replace
from math import ceil

import pytest

from lycheedecode import HybridConfig
from lycheedecode.config import DEFAULT_BUDGET_TOKENS


def test_defaults():
    config = HybridConfig()
    assert (config.selection, config.budget_tokens) == ("top_k", DEFAULT_BUDGET_TOKENS)
    assert config.retrieval_attention == "selected"
    with pytest.raises(FrozenInstanceError):
        config.block_size = 64


def test_a_ratio_alone_implies_its_strategy():
    assert HybridConfig(budget_ratio=0.1).selection == "ratio"
    assert HybridConfig(budget_ratio=0.1).budget_tokens is None
    capped = HybridConfig(budget_ratio=0.1, budget_tokens=1024, selection="ratio")
    assert capped.capacity_blocks(10_000) == 32


def test_chunks_are_whole_blocks():
    assert HybridConfig().chunk_tokens == 128
    assert HybridConfig(block_size=256, budget_tokens=4096).chunk_tokens == 256


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget_tokens": 0}, "budget_tokens must be a whole number of at least 1, not 0"),
        ({"budget_tokens": -5}, "at least 1, not -5"),
        ({"budget_tokens": 1.5}, "whole number"),
        ({"budget_tokens": True}, "whole number"),
        ({"budget_ratio": 0.0}, r"budget_ratio must be in \(0, 1\]"),
        ({"budget_ratio": 1.1}, r"budget_ratio must be in \(0, 1\]"),
        ({"budget_ratio": "half"}, r"budget_ratio must be in \(0, 1\]"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 24}, "power of two up to 256, not 24"),
        ({"block_size": 512}, "power of two up to 256, not 512"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"recent_tokens": 0}, "recent_tokens"),
        ({"correction_every": -1}, "correction_every"),
        ({"refresh_every": 0}, "refresh_every"),
        ({"refresh_every": 4097}, "refresh_every must be at most 4096, not 4097"),
        ({"budget_tokens": 1 << 31}, "budget_tokens must be at most 2147483647, not 2147483648"),
        ({"selection": "best"}, "'top_k', 'ratio', 'top_p', 'threshold'"),
        ({"retrieval_attention": "dense"}, "'selected', 'full'"),
        ({"block_score": "min"}, "'mass', 'max'"),
        ({"scan_keys": "int8"}, "'cache', 'float8', 'int4'"),
        ({"completion": "mean"}, "'plan', 'centroid', 'none'"),
        ({"completion_chunk": 0}, "completion_chunk must be a whole number of at least 1, not 0"),
        ({"completion_chunk": 96}, "power of two up to 4096, not 96"),
        ({"completion_chunk": 8192}, "power of two up to 4096, not 8192"),
        ({"scan_keys": "float8", "retrieval_attention": "full"}, "needs retrieval_attention='selected'"),
        ({"scan_keys": "int4", "retrieval_attention": "full"}, "scan_keys='int4' needs retrieval_attention='selected'"),
        ({"selection": "ratio"}, "needs budget_ratio"),
        ({"selection": "top_p"}, "needs top_p"),
        ({"selection": "threshold"}, "needs threshold"),
        ({"top_p": 0.9}, "belongs to selection='top_p'"),
        ({"budget_ratio": 0.5, "budget_tokens": 512}, "belongs to selection='ratio'"),
        ({"selection": "top_p", "top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"selection": "threshold", "threshold": 1}, r"threshold must be in \(0, 1\), not 1\."),
        ({"selection": "threshold", "threshold": 1.0}, r"threshold must be in \(0, 1\), not 1\.0"),
        ({"selection": "threshold", "threshold": 0.0}, r"threshold must be in \(0, 1\)"),
        ({"selection": "top_p", "top_p": True}, r"top_p must be in \(0, 1\], not True"),
        ({"budget_tokens": 64}, "raise it to at least 96"),
    ],
)
def test_invalid_settings_are_refused_in_one_sentence(settings, said):
    with pytest.raises(ValueError, match=said) as caught:
        HybridConfig(**settings)
    assert "\n" not in str(caught.value)


def test_the_advice_for_a_small_budget_is_right():
    assert HybridConfig(budget_tokens=96).budget_tokens == 96


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("recent", [1, 17, 64])
@pytest.mark.parametrize("refresh", [1, 4])
def test_forced_blocks_cover_every_position_of_the_newest_token(block_size, recent, refresh):
    config = HybridConfig(block_size=block_size, recent_tokens=recent, refresh_every=refresh, sink_tokens=5)
    most = 0
    for length in range(400, 400 + 2 * block_size):
        sinks = set(range(ceil(5 / block_size)))
        seen = {token // block_size for token in range(length - recent, length + refresh - 1)}
        most = max(most, len(sinks | seen))
    assert most <= config.forced_blocks <= most + 1


def test_capacity():
    config = HybridConfig(budget_tokens=1000, block_size=64)
    assert config.budget_blocks == 16
    assert config.capacity_blocks(1000) == 16
    assert config.capacity_blocks(3) == 3
    assert config.capacity_blocks(0) == 1
    ratio = HybridConfig(budget_ratio=0.25, block_size=64)
    assert ratio.capacity_blocks(100) == 25
    assert ratio.capacity_blocks(4) == ratio.forced_blocks
    assert HybridConfig(selection="top_p", top_p=0.9).capacity_blocks(77) == 77


@pytest.mark.parametrize(
    "config", [HybridConfig(), HybridConfig(budget_ratio=0.3), HybridConfig(selection="threshold", threshold=0.01)]
)
def test_settings_survive_json(config):
    assert HybridConfig.from_dict(config.to_dict()) == config
    assert replace(config, block_size=16).block_size == 16


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="'budget'; did you mean budget_ratio or budget_tokens"):
        HybridConfig.from_dict({"budget": 3})
