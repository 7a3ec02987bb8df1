"""`lycheedecode generate`: continue a prompt."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..checks import check_model_path
from ..config import HybridConfig
from ..engine.engine import Engine
from ..engine.generation import Generation
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
from .options import (
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

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False)


@app.command(no_args_is_help=False)
@takes("drawing", Sampling)
@takes_form
def generate(
    form: dict[str, Any],
    drawing: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; default: standard input.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", "-f", metavar="FILE", help="Read the prompt from a UTF-8 file."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            "-p",
            help="Head plan: a bundled name, a file, or auto, which finds one if none is known. "
            "\\[default: the model's bundled plan]",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Decode with full attention, without a plan.")] = False,
    against: Annotated[
        Literal["full"] | None,
        typer.Option("--compare", help="Also decode greedily with full attention, and show both."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Maximum number of new tokens.")] = 256,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template. \\[default: if the model has one]"),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this string; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue past the model's end token.")] = False,
    lossless: Annotated[
        bool,
        typer.Option("--lossless", help="Write what full attention would: one dense pass verifies several drafts."),
    ] = False,
    verify_every: Annotated[
        int | None, typer.Option("--verify-every", metavar="N", help="Drafts per verifying pass; implies --lossless.")
    ] = None,
    cache: Annotated[
        Literal["resident", "host", "auto"],
        typer.Option(help="Where the KV cache is kept: on the device, in host memory, or wherever it fits (auto)."),
    ] = "resident",
    store_ratio: Annotated[
        float,
        typer.Option(
            metavar="X", help="With the cache in host memory: blocks kept on the device, as a multiple of the budget."
        ),
    ] = 2.0,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Write a page that shows which blocks each token of the answer selected."
        ),
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    json_file: Json = None,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt."""
    check_writable(json_file, html)
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, not {max_new_tokens}.")
    if against and (full or drawing or stop):
        raise ConfigError("--compare decodes greedily in both ways: leave out --full, --stop and sampling options.")
    if html and (full or against):
        raise ConfigError("--html shows what selections hold: leave out --full and --compare.")
    if lossless or verify_every is not None:
        form["verify_every"] = "auto" if verify_every is None else verify_every
    if html and "verify_every" in form:
        raise ConfigError("--html shows what selections hold: leave out --lossless.")
    if cache != "resident" and (full or against or html):
        raise ConfigError("--cache is for hybrid decoding alone: leave out --full, --compare and --html.")
    if full or plan == "auto":
        check_model_path(model)
    if full and (plan is not None or set(form) - {"correction_every"}):
        raise ConfigError("--full decodes without a plan and a budget: leave out the options of hybrid decoding.")
    config, sampling = HybridConfig(**form), Sampling(**drawing)
    head_plan = None if full or plan == "auto" else load_plan(plan, model, device)
    text = _prompt(prompt, prompt_file)

    with quiet(verbose):
        with progress(f"Loading {model}"):
            network, tokenizer = load_model(model, device=device, dtype=dtype, device_map=device_map, revision=revision)
        if plan == "auto":
            head_plan = _find(network, tokenizer, config)
        engine = Engine(network, tokenizer, plan=head_plan, config=config, cache=cache, store_ratio=store_ratio)
        if chat is None:
            chat = bool(getattr(tokenizer, "chat_template", None))
        settings = {
            "model": model, "plan": None if full else plan or model, "config": config.to_dict(), "chat": chat,
            "dtype": str(network.dtype).removeprefix("torch."), "max_new_tokens": max_new_tokens,
            "sampling": vars(sampling), "stop": stop or [], "ignore_eos": ignore_eos, "compare": against,
            "cache": cache, "store_ratio": store_ratio,
        }  # fmt: skip
        if against:
            [prompt_ids] = encode(text, tokenizer, chat)
            dense = Engine(network, tokenizer)
            with progress(f"Decoding after {len(prompt_ids)} tokens in both ways"):
                comparison = compare(dense, engine, prompt_ids, max_new_tokens, ignore_eos=ignore_eos)
            _show(comparison, screen(json_file))
            _say_what_is_covered(len(prompt_ids) + len(comparison.hybrid.token_ids), config)
            result = comparison.to_dict()
        elif html:
            [prompt_ids] = encode(text, tokenizer, chat)
            with Steps("answer") as steps:
                view = watch(
                    engine, prompt_ids, max_new_tokens, sampling,
                    stop=stop or [], ignore_eos=ignore_eos, report=lambda done, total: steps.show("look", done, total),
                )  # fmt: skip
            print("".join(token.text for token in view.tokens), file=screen(json_file).file)
            write_whole(html, render(view, f"{model}: {len(view.tokens)} tokens after {len(prompt_ids)}"))
            _say_what_is_covered(len(prompt_ids) + len(view.tokens), config)
            errors.print(f"The page is {html}.", style="dim")
            result = asdict(view)
        else:
            out = screen(json_file).file
            result = _stream(engine, text, max_new_tokens, sampling, stop or [], chat, ignore_eos, out)
            if not full:
                _say_what_is_covered(result["prompt_tokens"] + len(result["token_ids"]), config)
    known = fingerprint(network, {} if head_plan is None else {plan or model: head_plan})
    save(json_file, Result("generate", settings, summary=result, fingerprint=known))


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


def _stream(
    engine: Engine,
    text: str,
    max_new_tokens: int,
    sampling: Sampling,
    stop: list[str],
    chat: bool,
    ignore_eos: bool,
    out: IO[str],
) -> dict[str, Any]:
    pieces = engine.stream(text, max_new_tokens, sampling=sampling, stop=stop, chat=chat, ignore_eos=ignore_eos)
    with progress("Reading the prompt"):
        piece = next(pieces)
    while True:
        out.write(piece.text)
        out.flush()
        if piece.generation is not None:
            break
        piece = next(pieces)
    out.write("\n")
    made = piece.generation
    errors.print(
        f"{made.prompt_tokens} + {len(made.token_ids)} tokens ({made.finish_reason}); prefill "
        f"{made.prefill_seconds:.2f} s; {made.tokens_per_second:.1f} tokens/s; "
        f"{megabytes(made.kv_bytes_per_token)} of KV cache read for each{_rounds(made)}{_place(made)}",
        style="dim",
    )
    return made.to_dict()


def _place(made: Generation) -> str:
    """Where the cache lies, unless it lies where the model is."""
    if not made.bytes_on_host:
        return ""
    return (
        f"; {megabytes(made.bytes_on_host)} of it in host memory, {megabytes(made.bytes_on_gpu)} beside the model, "
        f"{made.miss_rate:.1%} of selected blocks fetched"
    )


def _rounds(made: Generation) -> str:
    """What rounds brought, where there were any."""
    return f"; {made.rounds} rounds, {made.accepted} of {made.drafted} drafts stood" if made.rounds else ""


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
    console.print(
        f"\nequal for {comparison.equal_tokens} tokens; on the full answer: top-1 agreement "
        f"{comparison.top1_agreement:.1%}, mean KL {comparison.kl_mean:.4f} nats; "
        f"{comparison.speedup:.2f}x the speed, after {comparison.prompt_tokens} tokens"
    )
