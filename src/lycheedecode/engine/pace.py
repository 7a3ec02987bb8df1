"""How many drafts a round should have, from what rounds have brought and how long they took."""

from __future__ import annotations

from collections.abc import Sequence

_PRIOR = 0.9, 8.0
"""Share of drafts that stand, before any was seen, and how many seen ones outweigh it."""
_FADE, _BLEND = 0.9, 0.3
_WAIT = 64
"""Rounds without drafts before some are tried again."""


class Pace:
    """Chooses for a batch, from the share of drafts that stand and from the seconds of a draft, a pass and a full step.

    Args:
        most: drafts of a round.
        fixed: whether every round has that many.
    """

    def __init__(self, most: int, fixed: bool) -> None:
        self.most, self._fixed = most, fixed
        self._stood, self._tried = _PRIOR[0] * _PRIOR[1], _PRIOR[1]
        self._seconds: dict[str, float] = {}
        self._waited = 0

    def next(self) -> int:
        """Drafts of the next round; 0: a full step in its place."""
        if self._fixed:
            return self.most
        if "full" not in self._seconds:
            return 0
        if "draft" not in self._seconds:
            return self.most
        drafts = max(range(1, self.most + 1), key=self.speed)
        if self.speed(drafts) > 1 / self._seconds["full"]:
            self._waited = 0
            return drafts
        self._waited += 1
        return drafts if self._waited % _WAIT == 0 else 0

    def speed(self, drafts: int) -> float:
        """Tokens a second that a sequence gains in rounds of so many drafts."""
        share = self.share
        gained = drafts + 1 if share == 1 else (1 - share ** (drafts + 1)) / (1 - share)
        return gained / (drafts * self._seconds["draft"] + self._seconds["verify"])

    @property
    def share(self) -> float:
        """Of drafts, that stand where all before them in the round do."""
        return min(self._stood / self._tried, 1.0)

    def saw(self, drafts: int, accepted: Sequence[int], drafting: float, passing: float) -> None:
        """A round ended: how many drafts of each sequence stood, and the seconds of the drafts and of the pass."""
        if not drafts:
            return self._time("full", passing)
        self._stood = self._stood * _FADE + sum(accepted)
        self._tried = self._tried * _FADE + sum(min(count + 1, drafts) for count in accepted)
        self._time("draft", drafting / drafts)
        self._time("verify", passing)
        return None

    def _time(self, what: str, seconds: float) -> None:
        known = self._seconds.get(what)
        self._seconds[what] = seconds if known is None else min(known + _BLEND * (seconds - known), 2 * known)
