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


def test_signatures_say_what_is_returned_and_leave_out_what_is_private():
    def made(self, kept: int, _own: int = 0) -> Settings:
        raise NotImplementedError

    assert api._signature("Settings.made", made) == "Settings.made(kept: int) -> Settings"


def test_no_value_is_shown_by_its_place_in_memory():
    assert "Settings(kept: dict = ..., how: object = ...)" in api._section("Settings", Settings)
    page = api.render()
    assert " at 0x" not in page
    assert "<factory>" not in page
    assert page == api.render()
