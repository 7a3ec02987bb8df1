"""A pass key found in a long text, and another text continued, by full and by hybrid attention: `make demo`.

Writes demo.json and demo.png; everything runs on the model that is embedded in an installed package.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cli.report import errors, progress, quiet
from .config import HybridConfig
from .engine.engine import Engine
from .errors import InputError, LycheeError
from .evaluate.side_by_side import Comparison, compare
from .models.load import DEFAULT_MODEL, load_model
from .plan import HeadPlan
from .plan_views.png import require_matplotlib
from .prompts.makers import PromptMaker
from .prompts.text import NOISE
from .results import Result

CONFIG = HybridConfig(budget_tokens=512, block_size=16)
FACT = "The secret number of the city of Basel is"
NEW_TOKENS = 32


def main() -> None:
    """Run the demo, print what came out, write it down."""
    parser = argparse.ArgumentParser(prog="lycheedecode.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--plan", default=DEFAULT_MODEL, help="a bundled plan's name, or a file")
    parser.add_argument("--tokens", type=int, default=6000, help="tokens of the prompt")
    parser.add_argument("--out", type=Path, default=Path("build"), help="where demo.json and demo.png go")
    arguments = parser.parse_args()
    try:
        require_matplotlib()
        plan = HeadPlan.load(arguments.plan)
        with quiet(verbose=False):
            key, comparison, continued = run(arguments.model, plan, arguments.tokens)
    except LycheeError as error:
        sys.exit(f"{parser.prog}: {error}")
    tell(key, comparison)
    tell_of_text(continued)
    summary = {
        **_brief(comparison),
        "pass_key": key,
        "continuation": _brief(continued),
        "plan": {"name": arguments.plan, **plan.to_json()["model"], "retrieval_heads": len(plan.retrieval)},
    }
    settings = {"model": arguments.model, "config": CONFIG.to_dict()}
    Result("demo", settings, summary=summary).save(arguments.out / "demo.json")
    draw(comparison, plan, arguments.out / "demo.png")
    print(f"Written: {arguments.out / 'demo.json'}, {arguments.out / 'demo.png'}")


def run(model: str, plan: HeadPlan, tokens: int) -> tuple[str, Comparison, Comparison]:
    """Hide a pass key in `tokens` tokens and let both ways of decoding continue with it; then let both go on with as
    many tokens of plain prose, from the texts that plans are not found on."""
    with progress(f"Loading {model}"):
        network, tokenizer = load_model(model)
    hybrid = Engine(network, tokenizer, plan=plan, config=CONFIG)
    key, prompt_ids = hide(tokenizer, tokens, random.Random(0))
    errors.print(f"Reading {tokens} tokens once, then decoding with full attention and with the plan ...", style="dim")
    full = Engine(network, tokenizer)
    found = compare(full, hybrid, prompt_ids, NEW_TOKENS, timed_tokens=NEW_TOKENS, repeats=2)
    errors.print(f"The same with {tokens} tokens of prose, which only go on ...", style="dim")
    prose = PromptMaker(tokenizer, "prose", "evaluate").continuation(tokens, 2 * NEW_TOKENS, random.Random(0))
    return key, found, compare(full, hybrid, prose.prompt_ids, 2 * NEW_TOKENS, ignore_eos=True)


def hide(tokenizer: Any, tokens: int, rng: random.Random) -> tuple[str, list[int]]:
    """A pass key, and a prompt of `tokens` tokens that holds it somewhere and ends where it must follow."""
    key = f"{rng.randrange(100_000):05}"
    fact, question, filler = (
        tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        for text in (
            f"\n{FACT} {key}. Remember: {FACT} {key}.\n",
            f"\n\n{FACT}",
            NOISE * (tokens // 20 + 1),
        )
    )
    room = tokens - len(fact) - len(question)
    if room < 1:
        raise InputError(f"{tokens} tokens have no room for the hidden pass key: take more.")
    at = rng.randrange(room)
    return key, filler[:at] + fact + filler[at:room] + question


def tell(key: str, comparison: Comparison) -> None:
    """The outcome, in words."""
    full, hybrid = comparison.full, comparison.hybrid
    print(f"The number {key} is hidden in {comparison.prompt_tokens} tokens, which end with {FACT!r}.\n")
    for name, run in (("full attention", full), ("hybrid", hybrid)):
        print(f"  {name:14}  {' '.join(run.answer.split())}")
        print(f"  {'':14}  {run.tokens_per_second:.1f} tokens/s, "
              f"{run.kv_bytes_per_token / 1e6:.1f} MB of KV cache read per token\n")  # fmt: skip
    print(
        f"On the tokens of the full answer both agree in {comparison.top1_agreement:.0%} of the steps "
        f"(mean KL {comparison.kl_mean:.5f} nats).\nHybrid decoding reads "
        f"{full.kv_bytes_per_token / hybrid.kv_bytes_per_token:.1f}x less of the cache and is "
        f"{comparison.speedup:.2f}x as fast here, weights and all."
    )


def tell_of_text(comparison: Comparison) -> None:
    """How far both agree on plain text, where many tokens would do."""
    print(f"\n{comparison.prompt_tokens} tokens of prose go on like this:\n")
    for name, run in (("full attention", comparison.full), ("hybrid", comparison.hybrid)):
        print(f"  {name:14}  {' '.join(run.answer.split())[:160]} ...")
    print(f"\nBoth are alike for {comparison.equal_tokens} of {len(comparison.full.token_ids)} tokens.")
    if comparison.parting is not None:
        print(f"Where they part, {comparison.parting}.\nFrom there on, each continues a text of its own.")
    print(
        f"Fed the full answer, they agree in {comparison.top1_agreement:.0%} of the steps "
        f"(mean KL {comparison.kl_mean:.4f} nats)."
    )


def draw(comparison: Comparison, plan: HeadPlan, path: Path) -> None:
    """Speed and bytes of both ways, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = (("full attention", comparison.full, "#9aa5b4"), ("hybrid", comparison.hybrid, "#c2334d"))
    figure = Figure(figsize=(8.4, 2.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("KV cache read per token (MB)", lambda run: run.kv_bytes_per_token / 1e6),
        ("tokens per second", lambda run: run.tokens_per_second),
    )
    for axes, (title, value) in zip(figure.subplots(1, 2), panels, strict=True):
        for at, (name, run, colour) in enumerate(runs):
            bar = axes.barh(at, value(run), color=colour, height=0.62)
            axes.bar_label(bar, fmt="%.1f", padding=4, fontsize=9)
            axes.annotate(name, (0, at), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=9)
        axes.set(yticks=[], xticks=[], ylim=(1.6, -0.6))
        axes.margins(x=0.16)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[:].set_visible(False)
    total = plan.num_layers * plan.num_kv_heads
    figure.supxlabel(
        f"{comparison.prompt_tokens} tokens of context, {len(plan.retrieval)} of {total} KV heads retrieve, "
        f"{CONFIG.budget_tokens} tokens a selection. "
        f"Top-1 agreement {comparison.top1_agreement:.0%}, mean KL {comparison.kl_mean:.4f} nats.",
        fontsize=8, x=0.01, ha="left", color="#505a69",
    )  # fmt: skip
    figure.savefig(path, dpi=160)


def _brief(comparison: Comparison) -> dict[str, Any]:
    runs = {"full": comparison.full, "hybrid": comparison.hybrid}
    of_run, of_both = (
        ("answer", "tokens_per_second", "kv_bytes_per_token"),
        ("top1_agreement", "kl_mean", "equal_tokens", "speedup", "prompt_tokens"),
    )
    return {
        **{name: {each: getattr(run, each) for each in of_run} for name, run in runs.items()},
        **{name: getattr(comparison, name) for name in of_both},
        "parting": comparison.parting and asdict(comparison.parting),
    }


if __name__ == "__main__":
    main()
