"""`lycheedecode generate`: continue a prompt."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..checks import check_model_path, check_number, is_count
from ..config import HybridConfig
from ..engine.engine import Engine
from ..engine.generation import Generation
from ..engine.offload.attention import check_store_ratio, refuse_unfit
from ..engine.prompt import encode
from ..engine.sampling import Sampling
from ..errors import ConfigError, InputError
from ..evaluate.answer_view import render, watch
from ..evaluate.side_by_side import Comparison, compare
from ..files import write_whole
from ..identify.auto import auto_plan
from ..models.load import DEFAULT_MODEL, load_model
from ..plan import HeadPlan
from ..results import Result, fingerprint
from ..roles import check_budgets
from .options import (
    ATTENTION,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Revision,
    Verbose,
    load_plan,
    megabytes,
    takes,
    takes_form,
)
from .report import (
    Steps,
    check_writable,
    errors,
    progress,
    quiet,
    read_text,
    save,
    say_what_is_covered,
    screen,
)
from .tiers import HelpAll, tiered

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False)


@app.command(
    no_args_is_help=False,
    cls=tiered(
        "prompt prompt_file full against max_new_tokens chat stop lossless cache html "
        "form_budget_tokens form_block_size form_scan_keys drawing_temperature drawing_top_p drawing_seed"
    ),
)
@takes("drawing", Sampling)
@takes_form
def generate(
    form: dict[str, Any],
    drawing: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="The prompt. \\[default: standard input]")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", "-f", metavar="FILE", help="A file with the prompt; UTF-8."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            "-p",
            help="A bundled head plan's name, a file, or auto; auto finds one if none is known. "
            "\\[default: the model's bundled plan]",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Use full attention; no plan.")] = False,
    against: Annotated[
        Literal["full"] | None,
        typer.Option("--compare", metavar="full", help="Show full attention, too; both are greedy."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most new tokens.")] = 256,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template. \\[default: if the model has one]"),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this string; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue past the model's end token.")] = False,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless", help="Write what full attention would: one dense pass verifies several drafts.",
            rich_help_panel=ATTENTION,
        ),
    ] = False,
    verify_every: Annotated[
        str | None,
        typer.Option(
            "--verify-every", metavar="N", help="Drafts per verifying pass, or auto; implies --lossless.",
            rich_help_panel=ATTENTION,
        ),
    ] = None,
    cache: Annotated[
        Literal["resident", "host", "auto"],
        typer.Option(
            metavar="WHERE", rich_help_panel=ATTENTION,
            help="The KV cache is resident, host or auto: on the device, in host memory, or wherever it fits.",
        ),
    ] = "resident",
    store_ratio: Annotated[
        float,
        typer.Option(
            metavar="X", help="With the cache in host memory: blocks kept on the device, as a multiple of the budget.",
            rich_help_panel=ATTENTION,
        ),
    ] = 2.0,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE",
            help="Write a page of selections; it shows which blocks each token of the answer selected.",
        ),
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    json_file: Json = None,
    verbose: Verbose = False,
    help_all: HelpAll = False,
) -> None:  # fmt: skip
    """Continue a prompt."""
    check_writable(json_file, html)
    if lossless or verify_every is not None:
        drafts = "auto" if verify_every is None else verify_every
        form["verify_every"] = int(drafts) if is_count(drafts) else drafts
    asked = _Asked(model, plan, full, against, html, cache, store_ratio, max_new_tokens, chat, stop or [], ignore_eos)
    _refuse_what_does_not_combine(asked, form, drawing)
    config, sampling = HybridConfig(**form), Sampling(**drawing)
    head_plan = None if full or plan == "auto" else load_plan(plan, model, device)
    check_budgets(head_plan, config)
    if cache == "host":
        refuse_unfit(config, store_ratio, head_plan)
    text = _prompt(prompt, prompt_file)

    with quiet(verbose):
        with progress(f"Loading {model}"):
            network, tokenizer = load_model(model, device=device, dtype=dtype, device_map=device_map, revision=revision)
        if plan == "auto":
            head_plan = _find(network, tokenizer, config)
        engine = Engine(network, tokenizer, plan=head_plan, config=config, cache=cache, store_ratio=store_ratio)
        if chat is None:
            asked = replace(asked, chat=bool(getattr(tokenizer, "chat_template", None)))
        run = _compare if against else _watch if html else _stream
        result = run(asked, engine, text, sampling, screen(json_file))
    known = fingerprint(network, {} if head_plan is None else {plan or model: head_plan})
    settings = asked.to_dict(config, sampling, str(network.dtype).removeprefix("torch."))
    save(json_file, Result("generate", settings, summary=result, fingerprint=known))


@dataclass(frozen=True)
class _Asked:
    """The options of a call that say what to do with the answer."""

    model: str
    plan: str | None
    full: bool
    against: Literal["full"] | None
    html: Path | None
    cache: Literal["resident", "host", "auto"]
    store_ratio: float
    max_new_tokens: int
    chat: bool | None
    stop: list[str]
    ignore_eos: bool

    def to_dict(self, config: HybridConfig, sampling: Sampling, dtype: str) -> dict[str, Any]:
        """The settings of a result."""
        return {
            "model": self.model, "plan": None if self.full else self.plan or self.model, "config": config.to_dict(),
            "chat": self.chat, "dtype": dtype, "max_new_tokens": self.max_new_tokens, "sampling": vars(sampling),
            "stop": self.stop, "ignore_eos": self.ignore_eos, "compare": self.against, "cache": self.cache,
            "store_ratio": self.store_ratio,
        }  # fmt: skip


def _refuse_what_does_not_combine(asked: _Asked, form: Mapping[str, Any], drawing: Mapping[str, Any]) -> None:
    """Raise before a model is loaded."""
    full, against, html = asked.full, asked.against, asked.html
    check_number("--max-new-tokens", asked.max_new_tokens, 2 if against else 1)
    check_store_ratio(asked.store_ratio)
    if against and (full or drawing or asked.stop):
        raise ConfigError("--compare decodes greedily in both ways: leave out --full, --stop and sampling options.")
    if html and (full or against):
        raise ConfigError("--html shows what selections hold: leave out --full and --compare.")
    if form.get("verify_every") == 0:
        raise ConfigError("--verify-every must be at least 1, not 0: without it and --lossless, nothing is verified.")
    if against and "verify_every" in form:
        raise ConfigError("--compare shows what hybrid attention changes, --lossless changes nothing: leave one out.")
    if html and "verify_every" in form:
        raise ConfigError("--html shows what selections hold: leave out --lossless.")
    if asked.cache != "resident" and (full or against or html):
        raise ConfigError("--cache is for hybrid decoding alone: leave out --full, --compare and --html.")
    if full or asked.plan == "auto":
        check_model_path(asked.model)
    if full and (asked.plan is not None or set(form) - {"correction_every"}):
        raise ConfigError("--full decodes without a plan and a budget: leave out the options of hybrid decoding.")


def _compare(asked: _Asked, engine: Engine, text: str, sampling: Sampling, console: Console) -> dict[str, Any]:
    """Decode greedily in both ways, and show the answers side by side."""
    [prompt_ids] = encode(text, engine.tokenizer, bool(asked.chat))
    dense = Engine(engine.model, engine.tokenizer)
    with progress(f"Decoding after {len(prompt_ids)} tokens in both ways"):
        comparison = compare(dense, engine, prompt_ids, asked.max_new_tokens, ignore_eos=asked.ignore_eos)
    _show(comparison, console)
    _say_what_is_covered(len(prompt_ids) + len(comparison.hybrid.token_ids), engine.config)
    return comparison.to_dict()


def _watch(asked: _Asked, engine: Engine, text: str, sampling: Sampling, console: Console) -> dict[str, Any]:
    """Decode, print the answer, and write the page of its selections."""
    assert asked.html is not None
    [prompt_ids] = encode(text, engine.tokenizer, bool(asked.chat))
    with Steps("answer") as steps:
        view = watch(
            engine, prompt_ids, asked.max_new_tokens, sampling, stop=asked.stop, ignore_eos=asked.ignore_eos,
            report=lambda done, total: steps.show("look", done, total),
        )  # fmt: skip
    print("".join(token.text for token in view.tokens), file=console.file)
    write_whole(asked.html, render(view, f"{asked.model}: {len(view.tokens)} tokens after {len(prompt_ids)}"))
    _say_what_is_covered(len(prompt_ids) + len(view.tokens), engine.config)
    errors.print(f"The page is {asked.html}.", style="dim")
    return asdict(view)


def _stream(asked: _Asked, engine: Engine, text: str, sampling: Sampling, console: Console) -> dict[str, Any]:
    """Decode, and print the answer as it comes."""
    pieces = engine.stream(
        text, asked.max_new_tokens, sampling=sampling, stop=asked.stop, chat=bool(asked.chat),
        ignore_eos=asked.ignore_eos,
    )  # fmt: skip
    with progress("Reading the prompt"):
        piece = next(pieces)
    while True:
        console.file.write(piece.text)
        console.file.flush()
        if piece.generation is not None:
            break
        piece = next(pieces)
    console.file.write("\n")
    made = piece.generation
    errors.print(
        f"{made.prompt_tokens} + {len(made.token_ids)} tokens ({made.finish_reason}); prefill "
        f"{made.prefill_seconds:.2f} s; {made.tokens_per_second:.1f} tokens/s; "
        f"{megabytes(made.kv_bytes_per_token)} of KV cache read per token{_rounds(made)}{_place(made)}",
        style="dim",
    )
    if not asked.full:
        _say_what_is_covered(made.prompt_tokens + len(made.token_ids), engine.config)
    return made.to_dict()


def _say_what_is_covered(tokens: int, config: HybridConfig) -> None:
    say_what_is_covered(tokens, config.budget_tokens if config.selection == "top_k" else None)


def _find(network: Any, tokenizer: Any, config: HybridConfig) -> HeadPlan:
    with Steps() as steps:
        return auto_plan(
            network, tokenizer, config,
            report=lambda progress: steps.show(progress.stage, progress.step, progress.steps),
            say=lambda sentence: errors.print(sentence, style="dim"),
        )  # fmt: skip


def _prompt(given: str | None, file: Path | None) -> str:
    if given is not None and file is not None:
        raise ConfigError("Give the prompt as an argument or with --prompt-file, not both.")
    if given is None and file is None and sys.stdin.isatty():
        raise InputError("There is no prompt: give it as an argument, with --prompt-file, or on standard input.")
    text = given if given is not None else read_text(file or Path("-"))
    if not text.strip():
        raise InputError("The prompt is empty: give it as an argument, with --prompt-file, or on standard input.")
    return text


def _place(made: Generation) -> str:
    """How much of the cache is in host memory, if any is."""
    if not made.bytes_on_host:
        return ""
    return (
        f"; {megabytes(made.bytes_on_host)} of it in host memory, {megabytes(made.bytes_on_gpu)} beside the model, "
        f"{made.miss_rate:.1%} of selected blocks fetched"
    )


def _rounds(made: Generation) -> str:
    """Counts of lossless rounds, if there were any."""
    return f"; {made.rounds} rounds, {made.accepted} of {made.drafted} drafts accepted" if made.rounds else ""


def _show(comparison: Comparison, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    full, hybrid = comparison.full, comparison.hybrid
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    for name, ratio in (("", 1), ("full attention", 3), ("hybrid", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    table.add_row("answer", Text(full.answer.strip("\n")), Text(hybrid.answer.strip("\n")))
    table.add_row("tokens", str(len(full.token_ids)), str(len(hybrid.token_ids)))
    table.add_row("tokens/s", f"{full.tokens_per_second:.1f}", f"{hybrid.tokens_per_second:.1f}")
    table.add_row("KV cache per token", megabytes(full.kv_bytes_per_token), megabytes(hybrid.kv_bytes_per_token))
    console.print(table)
    parting = "" if comparison.parting is None else f", then {comparison.parting}"
    console.print(
        f"\nequal for {comparison.equal_tokens} tokens{parting}; on the full answer: top-1 agreement "
        f"{comparison.top1_agreement:.1%}, mean KL {comparison.kl_mean:.4f} nats; "
        f"{comparison.speedup:.2f}x the speed, after {comparison.prompt_tokens} tokens",
        markup=False,
    )
