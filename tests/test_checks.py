"""Types of settings."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from lycheedecode import HybridConfig, Sampling
from lycheedecode.checks import check_types, is_count
from lycheedecode.errors import ConfigError


@dataclass
class Settings:
    count: int = 1
    share: float | None = None
    on: bool = True
    name: str = "a"
    kind: Literal["x", "y"] = "x"
    sizes: tuple[int, ...] = ()
    config: HybridConfig | None = None
    rest: Any = None

    def __post_init__(self) -> None:
        check_types(self)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", np.int64(3)),
        ("share", 1),
        ("share", np.float32(0.5)),
        ("share", None),
        ("kind", "y"),
        ("sizes", [1, 2]),
        ("config", HybridConfig()),
        ("rest", object()),
    ],
)
def test_what_fits(name, value):
    assert getattr(Settings(**{name: value}), name) is value


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("count", "3", "count must be a whole number, not '3'."),
        ("count", True, "count must be a whole number, not True."),
        ("count", 1.5, "count must be a whole number, not 1.5."),
        ("count", 1 << 31, "count must be at most 2147483647, not 2147483648."),
        ("sizes", (1, 10**20), "sizes must be at most 2147483647, not 100000000000000000000."),
        ("share", "much", "share must be a number or None, not 'much'."),
        ("on", 1, "on must be True or False, not 1."),
        ("name", b"a", "name must be text, not b'a'."),
        ("kind", ["x"], "kind must be one of 'x', 'y', not ['x']."),
        ("sizes", (1, "2"), "sizes must be a tuple of a whole number, not (1, '2')."),
        ("config", {"block_size": 16}, "config must be a HybridConfig or None, not {'block_size': 16}."),
        (
            "name",
            ["long"] * 50,
            f"name must be text, not {str(['long'] * 50)[:60]}...",
        ),
    ],
)
def test_what_does_not(name, value, said):
    with pytest.raises(ConfigError) as caught:
        Settings(**{name: value})
    assert str(caught.value) == said


@pytest.mark.parametrize("text", ["0", "4096", "2147483647", "0004"])
def test_a_count(text):
    assert is_count(text)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "auto", "2147483648", "1" * 5000])
def test_no_count(text):
    assert not is_count(text)


def test_seeds_have_64_bits():
    for seed in (-(1 << 63), (1 << 64) - 1):
        assert Sampling(seed=seed).seed == seed
        with pytest.raises(ConfigError, match="seed must have at most 64 bits"):
            Sampling(seed=2 * seed)
    for seed in (np.int64(3), np.uint64((1 << 64) - 1)):  # for which a range would look one by one
        assert Sampling(seed=seed).seed == seed


def test_numbers_of_numpy_are_numbers():
    given = {"budget_ratio": np.float32(0.5), "selection": "ratio", "verify_every": np.int64(4)}
    config = HybridConfig(**given)
    assert json.dumps(config.to_dict())
    assert (config.budget_ratio, config.verify_every) == (0.5, 4)


def test_where_it_is_used():
    with pytest.raises(ConfigError, match=r"temperature must be a number, not '0\.7'"):
        Sampling(temperature="0.7")
