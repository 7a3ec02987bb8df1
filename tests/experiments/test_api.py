"""The page of the API says the same at every run."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments import api


@dataclass
class Settings:
    """Some.

    Attributes:
        kept: what is kept.
    """

    kept: dict = field(default_factory=dict)
    how: object = object()


def test_no_value_is_shown_by_its_place_in_memory():
    assert "Settings(kept: dict = ..., how: object = ...)" in api._section("Settings", Settings)
    page = api.render()
    assert " at 0x" not in page
    assert "<factory>" not in page
    assert page == api.render()
