"""How many drafts a round has, and how often they select, from what rounds have brought and how long they took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_PRIOR = 0.9, 8.0
"""Assumed chance that a draft is accepted before any was seen, and how many drafts that assumption counts as."""
_FADE, _SLOWER, _FASTER = 0.9, 0.2, 0.7
"""Decay of older rounds; how far a slower and a faster measurement move the estimated time."""
_WAIT, _LONGEST = 64, 1024
"""Rounds before retrying what did not pay; twice as many after every retry that did not, up to the longest."""
_WORTH = 1.03
"""Speed-up over full steps that rounds have to promise: the best of many estimates is too good by about as much."""


class Schedule(NamedTuple):
    """A round: its number of drafts, and drafts per selection. Without drafts: a full step."""

    drafts: int
    refresh: int


class Pace:
    """Chooses for a batch, from drafts that were accepted and from the seconds of a draft, a full step and a pass.

    Args:
        most: drafts of a round.
        fixed: whether every round has that many.
        refreshes: that may be chosen; if `fixed`, one.
    """

    def __init__(self, most: int, fixed: bool, refreshes: Sequence[int] = (1,)) -> None:
        self.most, self._fixed, self._refreshes = most, fixed, tuple(refreshes)
        self._accepted = dict.fromkeys(refreshes, _PRIOR[0] * _PRIOR[1])
        self._tried = dict.fromkeys(refreshes, _PRIOR[1])
        self._seconds: dict[str, float] = {}
        self._seen: set[int] = set()
        self._trials = [Schedule(0, 1), Schedule(-(-most // 2), self._refreshes[-1])] if most else []
        self._pays: bool | None = None
        self._waited, self._wait = 0, _WAIT

    def next(self) -> Schedule:
        """The next round."""
        if self._fixed:
            return Schedule(self.most, self._refreshes[0])
        if self._trials:  # of drafts only half a round: they cost something where they do not pay
            return self._trials.pop(0)
        if not {"full", "select", "more"} <= self._seconds.keys():
            return Schedule(0, 1)
        ranked = sorted((self._best(refresh) for refresh in self._refreshes), key=self.speed)
        pays = self.speed(ranked[-1]) > _WORTH / self._seconds["full"]
        again = self._retries(pays)
        if pays:
            return ranked[0] if again else ranked[-1]
        return ranked[-1] if again else Schedule(0, 1)

    def _retries(self, pays: bool) -> bool:
        """Whether it is time for what seemed slower."""
        if pays != self._pays:
            self._pays, self._waited, self._wait = pays, 0, _WAIT
        self._waited += 1
        if self._waited < self._wait:
            return False
        self._waited, self._wait = 0, min(2 * self._wait, _LONGEST)
        return True

    def _best(self, refresh: int) -> Schedule:
        return max((Schedule(drafts, refresh) for drafts in range(1, self.most + 1)), key=self.speed)

    def speed(self, schedule: Schedule) -> float:
        """Tokens a second that a sequence gains in such rounds."""
        (drafts, refresh), chance = schedule, self.acceptance(schedule.refresh)
        gained = drafts + 1 if chance == 1 else (1 - chance ** (drafts + 1)) / (1 - chance)
        selecting = -(-drafts // refresh)
        passing = self._seconds["full"] + drafts * self._seconds["more"]
        seconds = selecting * self._seconds["select"] + max(passing, 0.0)
        if drafts > selecting:
            seconds += (drafts - selecting) * self._seconds["keep"]
        return gained / seconds

    def acceptance(self, refresh: int) -> float:
        """The chance that a draft is accepted if all drafts before it were.

        A refresh that was not tried yet is assumed to reject half as many as the best one that was: so it is tried if
        that would pay.
        """
        if self._seen and refresh not in self._seen:
            return 0.5 + max(self.acceptance(other) for other in self._seen) / 2
        return min(self._accepted[refresh] / self._tried[refresh], 1.0)

    def record(self, schedule: Schedule, accepted: Sequence[int], drafting: Sequence[float], passing: float) -> None:
        """Record a round: accepted drafts of each sequence, and the seconds of each draft and of the pass."""
        drafts, refresh = schedule
        if not drafts:
            self._time("full", passing)
            return
        self._seen.add(refresh)
        self._accepted[refresh] = self._accepted[refresh] * _FADE + sum(accepted)
        self._tried[refresh] = self._tried[refresh] * _FADE + sum(min(count + 1, drafts) for count in accepted)
        for what, times in (
            ("select", drafting[::refresh]),
            ("keep", [t for j, t in enumerate(drafting) if j % refresh]),
        ):
            if times:
                self._time(what, sum(times) / len(times))
        # On a GPU a pass takes about a full step's time; on a CPU each of its tokens adds to it.
        if "full" in self._seconds:
            self._time("more", (passing - self._seconds["full"]) / drafts, self._seconds["full"])

    def _time(self, what: str, seconds: float, most: float | None = None) -> None:
        """Move an estimate, by no more than `most`, or what it is."""
        known = self._seconds.get(what, seconds)
        change = min(seconds - known, known if most is None else most)
        self._seconds[what] = known + (_SLOWER if change > 0 else _FASTER) * change
