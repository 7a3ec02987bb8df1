"""Which pictures can be drawn of the result files, and where the page shows them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments.report import draw_fidelity as fidelity
from experiments.report import draw_speed as speed
from experiments.report.picture import legend_below, new_figure, save
from experiments.report.sources import PromptKind, Row, Source


class Picture(NamedTuple):
    """A file name, a caption, how it is drawn, and the result file that it belongs to; without one, to the page."""

    name: str
    caption: str
    draw: Callable[[Path], None]
    of: str | None = None


def pictures(sources: Sequence[Source]) -> Iterator[Picture]:
    """All of them, the page's first."""
    front = partial(_front, sources)
    if _front_panels(sources):
        yield Picture(
            "front.png", "Milliseconds a token over the context; mean KL of policies that read as much", front
        )
    for (model, machine), batches in speed.times(sources).items():
        name = (
            "ms-"
            + re.sub(
                r"[^a-z0-9]+", "-", f"{model} {machine}".lower().replace("'s shape", "").replace(" x ", "x ")
            ).strip("-")
            + ".png"
        )
        yield Picture(
            name, f"Milliseconds a token over the context, {model}, {machine}",
            partial(speed.draw_times, batches, f"{model}, {machine}"),
        )  # fmt: skip
    for source in sources:
        yield from _of_file(source)


def _of_file(source: Source) -> Iterator[Picture]:
    name = f"{source.name}.png"
    if panels := fidelity.over_bytes(source):
        caption = "Mean KL over the KV bytes that a token reads, with 95% intervals where they were measured"
        yield Picture(name, caption, partial(fidelity.draw_over_bytes, panels), source.name)
    elif bars := fidelity.side_by_side(source):
        caption = "Mean KL of policies, with 95% intervals where they were measured"
        yield Picture(name, caption, partial(fidelity.draw_side_by_side, bars), source.name)
    elif panels := fidelity.scores_over_bytes(source):
        caption = "Scores over the KV bytes that a token reads, with 95% intervals"
        yield Picture(name, caption, partial(fidelity.draw_over_bytes, panels, score=True), source.name)
    elif speed.has_operations(source):
        caption = "What operations read a second, as a share of what the memory gives"
        yield Picture(name, caption, partial(speed.draw_operations, source), source.name)


# ---------------------------------------------------------------------- the front page's


def _front_panels(sources: Sequence[Source]) -> tuple[str, speed.Series, str, dict[str, Row]] | None:
    """The model with most contexts at batch 1, and the best comparison at equal bytes: of continued texts
    where there are any, with most names, the hardest for hybrid."""
    times = {key: batches[1] for key, batches in speed.times(sources).items() if 1 in batches}
    bars = [
        (PromptKind.parse(kind), source, scores)
        for source in sources if source.settings.get("match_bytes")
        for kind, scores in fidelity.side_by_side(source).items()
        if _alike([score["kv_bytes_per_token"] for score in scores.values()])
    ]  # fmt: skip
    if not times or not bars:
        return None
    (model, machine), all_series = max(times.items(), key=lambda item: sum(map(len, item[1].values())))
    series = {name: points for name, points in all_series.items() if len(points) > 1}
    kind, source, scores = max(bars, key=lambda one: (one[0].continues, len(one[2]), _kl(one[2])))
    title = f"{source.model},\n{kind.length} tokens of {kind.text},\n{kind.asked}; all read as much"
    return f"{model}, {machine}, batch 1", series, title, scores


def _alike(sizes: Sequence[float]) -> bool:
    return max(sizes) <= 1.1 * min(sizes)


def _kl(scores: dict[str, Row]) -> float:
    return next(score["kl_mean"] for score in scores.values() if score["policy"] == "hybrid")


def _front(sources: Sequence[Source], path: Path) -> None:
    found = _front_panels(sources)
    assert found is not None
    title, series, kind, scores = found
    figure = new_figure(9.6, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    speed.panel_of_times(left, series, title)
    fidelity.panel_of_bars(right, scores, kind)
    legend_below(figure)
    save(figure, path)
