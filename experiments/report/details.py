"""A section of the page for each result file: machine, picture, what it says, and folded, all its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.report import same_bytes, summaries, tables
from experiments.report.pictures import Picture
from experiments.report.sources import Row, Source

SHORT = 12
"""Lines up to which numbers are not folded."""
_DENSE = "`paper` reads more than the others: its retrieval heads read the whole cache."
_YIELDS = (
    "A round yields what the same rounds (budget, drafts, their weights, drafts to a selection) yielded in texts of "
    "the model that `yield of` names. `ms per token` and `speedup` follow from that and from the two times that were "
    "measured here, of the round and of the full step; in the file they follow from what was assumed when it was made. "
    "No text as long as these was measured, and 4096 tokens are a smaller share of it."
)
_LINEAR_ROWS = (
    "cuBLAS's times of single projections are those of the products alone; `2 layers` has norms, gates and sums around "
    "them, as a model does, and decided. `ours` is the fastest launch on trial, `default` the one before: those in use "
    "since are within 5% of the fastest on the H200 (7% in Qwen2.5-1.5B's shape) and within 8% on the H100."
)
_EQUAL = (
    "All read as many bytes as the plan that ships does with a budget of 1024. Only `hybrid+float8` and `hybrid+int4` "
    "keep and scan smaller copies of keys; peers that look at all keys read them in 16 bits."
)
NOTES = {
    "cpu-lossless-drafts-smollm2-135m": "For its tokens per round: beside other programs, seconds say nothing.",
    "continuations-qwen2.5-coder-1.5b": "`one plan for all budgets` is the plan that ships; its coupling of 0.2 was "
    "chosen on these prompts. Everything after the prefill ran in bfloat16: differences below that of `full attention "
    f"by another kernel` are rounding. {_DENSE}",
    "continuations-smollm2-135m": "`joined-28-coupling-0.2` is the plan that ships; `plan-smollm2-135m` is the one "
    f"before it, of 14 heads, found on passkeys, which other files of SmolLM2 were measured with. {_DENSE}",
    "h100-equal-bytes-qwen2.5-coder-1.5b": "`ours-7` is what `identify --num-retrieval-heads 7` finds, `paper-7` what "
    f"the paper's own identification does (HardKuma gates, 400 steps, 10 passkeys in 1K and 2K tokens). {_EQUAL}",
    "h100-equal-bytes-8k-16k-qwen2.5-coder-1.5b": f"Plans as in the file of 30000 tokens. {_EQUAL}",
    "h100-gsm8k-qwen2.5-coder-1.5b": "128 problems do not tell 1.5 points apart.",
    "h100-lossless-attend": "With `--tune`, before its choice: 9 tokens are launched as `(16, 64, 4, 3, 1)` since.",
    "h100-linear-rows": _LINEAR_ROWS,
    "h200-linear-rows": f"{_LINEAR_ROWS} The run ended in Qwen2.5-1.5B's shape.",
    "h100-lossless-real-4096": "What rounds yield under the budget of `h100-lossless-rounds` and others. In bfloat16: "
    "every way leaves the text of full attention's steps at the same tokens.",
    "h100-lossless-rounds-3x128k-16-rows": "Made with `python -m experiments.with_rows 16`: the linear layers of the "
    "pass, 27 rows, are cuBLAS's.",
    "h100-lossless-rounds-3x128k-64-rows": "As above, with 64: those layers are our kernel's, with launches that were "
    "timed on this GPU.",
    "h200-lossless-attend-tune": "With `--tune`, before its choice; the run ended in 1 x 128K. 9 tokens are launched "
    "as `(16, 64, 4, 4, 1)` since.",
    "h200-lossless-rounds-1x512k": "The full step is 0.9 ms slower than the pass over 9 tokens, for a reason that is "
    "not known. Beside a step as fast as the pass, rounds would be 2.97 and, with 8-bit drafts, 3.63 times as fast.",
    "h200-lossless-rounds-4x128k-16-rows": "Made with `python -m experiments.with_rows 16`: the linear layers of the "
    "pass, 36 rows, are cuBLAS's.",
    "h200-lossless-rounds-4x128k-64-rows": "From the same GPU as the file above: those layers are our kernel's, as "
    "they are by default. Kernels of attention have become faster since (`h200-lossless-rounds`).",
    **dict.fromkeys(
        ("h200-generate", "h200-step-llama-3-8b", "h200-step-qwen3-8b"),
        "Since then, full attention of one token at 1 x 128K is launched otherwise on an H200: a full step of "
        "Llama-3-8B's shape takes 8.19 ms (`h200-step-completion`).",
    ),
    "h100-same-bytes-qwen2.5-coder-1.5b": "Judged over one dense prefill, as identification sees it, not in the "
    "engine. The first form is a plan of 14 heads found on 12 prompts of code and 12 of prose, with a budget of 1024. "
    "The other budgets: 2880 tokens for 14 heads with `float8` keys and for 7 heads with the cache's, 3808 for 7 with "
    "`float8`, 3712 for 14 with `int4`, 2656 for 28. `int4`: a scale for 32 numbers of a key, or of a channel. "
    "`factors`: completion's, up to 4. `budgets`: given out by a second-order model under the same total, to "
    "selections or to heads. `two donors`: half of the budget from each. `anything`: all of these.",
    "h100-completion-qwen2.5-coder-1.5b": "Every head with its own selection. `recent` has no numbers because of a "
    "fault of the study, mended since.",
    "h100-completion-smollm2-135m": "Every head with its own selection.",
    "h100-continuations-qwen2.5-coder-0.5b": "`hybrid` is the plan that ships, of 12 of 48 heads. Here, equal budgets "
    f"are not equal bytes. {_DENSE}",
    "h100-ruler-qwen2.5-coder-1.5b": "NVIDIA's data.",
    "h100-ruler-float8-qwen2.5-coder-1.5b": "NVIDIA's data, and the items of `h100-ruler-qwen2.5-coder-1.5b`: 3072 and "
    "4096 tokens read as much here as 1024 and 2048 do there.",
    "h100-generate-qwen2.5-coder-1.5b": "At 32 x 30000, both ways are 0.6 to 0.7 ms slower than in "
    "`h100-lossless-real`, for a reason that is not known; at 16 x 30000, hybrid is as fast as in "
    "`h100-memory-qwen2.5-coder-1.5b` (2.79 ms).",
    "h100-generate-float8-qwen2.5-coder-1.5b": "At 30000 tokens, a budget of 2880 reads as much as one of 1024 does "
    "in `h100-generate-qwen2.5-coder-1.5b`.",
    "h100-memory-llama-3-8b-1m": "On a host of 504 GiB; one of its GPUs was used.",
    "h100-memory-qwen2.5-coder-1.5b": "In every row from host memory, all 16 texts have the tokens of the resident "
    "cache: the benchmark ends if one has not. Each text is read once and continued twice: `miss rate` counts the 256 "
    "steps after its start, `later miss rate` the later half.",
    "h100-serving-lossless-32x30k": "In bfloat16. The row of stock compares its texts with those that it writes one at "
    "a time. `wrong` is empty: where lossless texts leave stock's, rounding moves stock's own tokens as far.",
    "h100-serving-lossless-coder-1.5b": "In bfloat16. The file says where texts leave stock's; that they may do so at "
    "near ties only has been checked since.",
    "h200-serving-llama-3-8b": "Under `NHD`, the layout that vLLM 0.26 takes by itself. At 1 x 1K neither way of the "
    "plugin scans: between them are 4% for a reason that is not known. Of three earlier runs, on other GPUs, two had "
    "`hybrid` within 1% of stock there, and one 2.4% above it.",
    "h200-serving-qwen3-30b-a3b": "All 48 layers, with vLLM's own kernels for experts.",
    "h100-serving-lossless-smollm2": "In bfloat16, as above. Without the rows of 4 x 1000, whose speeds were "
    "differences of times too short to measure: one was negative.",
}
"""What a reader of a file has to know and its numbers do not say."""


def _scored(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Rows of tasks on which full attention scores at all, and a line that says which others are left out."""
    zero = {_place(row) for row in rows if row["policy"] == "full" and row["score"] == 0}
    kept = [row for row in rows if _place(row) not in zero]
    if not zero:
        return kept, []
    names = ", ".join(f"{task} ({length} tokens)" if length else str(task) for task, length, _ in sorted(zero, key=str))
    return kept, [f"Left out, for full attention scores 0%: {names}.", ""]


def _place(row: Row) -> tuple[Any, ...]:
    return row["task"], row.get("length"), row["metric"]


def section(source: Source, drawn: Sequence[Picture]) -> str:
    """The section's text."""
    result = source.result
    lines = [f"### {source.name}: {result.command}", "", *tables.machine_line(result.environment), ""]
    if source.name in NOTES:
        lines += [NOTES[source.name], ""]
    if any("yield_of" in row for row in source.rows):
        lines += [_YIELDS, ""]
    for picture in drawn:
        if picture.of == source.name:
            lines += [f"![{picture.caption}]({source.folder}/{picture.name})", ""]
    found = source.found
    if result.command == "evaluate tasks":
        found["rows"], unsolved = _scored(source.rows)
        lines += unsolved
    summary = list(summaries.lines(found))
    if result.command == "same bytes":
        lines += [*same_bytes.lines(found, result.settings), ""]
        summary = []
    if "variants" in found:
        summary, numbers = [], list(tables.variant_lines(found["variants"]))
    else:
        numbers = list(tables.result_lines(found))
    if len(summary) > 2 * SHORT:
        summary, numbers = [], [*summary, "", *numbers]
    if len(numbers) > SHORT:
        numbers = ["<details><summary>All numbers</summary>", "", *numbers, "", "</details>"]
    return "\n".join([*lines, *summary, *([""] if summary else []), *numbers]) + "\n"
