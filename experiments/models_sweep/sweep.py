"""python -m experiments.models_sweep: every causal class of the installed transformers, exact or refused.

Each class gets a tiny random model, in a process of its own with a time limit. The right logits are those of its own
`generate`; `hybrid` and `Engine` must give the same with a budget that covers the context: for one prompt, and
(Engine) for a prompt in chunks and a padded batch. With a small budget they must differ, or nothing was replaced.
"""

from __future__ import annotations

import multiprocessing
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lycheedecode.errors import LycheeError, first_line

from . import tiny

PROMPT, ANSWER, SHORTER = 61, 6, 23
"""Tokens of the prompt, of what is generated, and by how much another prompt of a batch is shorter."""
SECONDS = 180
"""Time limit of a class."""
TOLERANCE = 2e-3
"""Largest difference of logits, as a share of their standard deviation."""
OUTCOMES = ("exact", "refused", "wrong", "error", "no model")


@dataclass
class Outcome:
    """What became of a class in one form.

    Attributes:
        outcome: one of `OUTCOMES`.
        why: the refusal, the error, or what differs by how much.
    """

    outcome: str
    why: str = ""


@dataclass
class Row:
    """A class of the sweep."""

    model_type: str
    architecture: str
    hybrid: Outcome
    engine: Outcome

    @property
    def is_right(self) -> bool:
        return {self.hybrid.outcome, self.engine.outcome} <= {"exact", "refused"}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def classes() -> dict[str, str]:
    """Every class of `AutoModelForCausalLM`, with a model type that it belongs to."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: dict[str, str] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(names if isinstance(names, str) else names[-1], model_type)
    return found


def sweep(only: Sequence[str] = ()) -> Iterator[Row]:
    """One row for every class, or for those named."""
    for architecture, model_type in classes().items():
        if not only or architecture in only or model_type in only:
            yield Row(model_type, architecture, *_guarded(architecture))


def _guarded(architecture: str) -> tuple[Outcome, Outcome]:
    """`examine` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, architecture), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return (Outcome("error", f"no answer within {SECONDS} s"),) * 2
        return receiver.recv()
    except EOFError:
        return (Outcome("error", "the process died"),) * 2
    finally:
        process.kill()
        process.join()


def _send(sender: Any, architecture: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sender.send(examine(architecture))


def examine(architecture: str) -> tuple[Outcome, Outcome]:
    """What becomes of a class in `hybrid` and in `Engine`."""
    if architecture in tiny.NOT_ALONE:
        return (Outcome("refused", tiny.NOT_ALONE[architecture]),) * 2
    try:
        model = tiny.make(architecture)
        right = generated(model, prompts()[0])
    except Exception as error:
        return (_refused_as_it_is(architecture) or Outcome("no model", _brief(error)),) * 2
    return _judged(hybrid_differs, model, right), _judged(engine_differs, model, right)


def _refused_as_it_is(architecture: str) -> Outcome | None:
    """The refusal of a class whose small model does not generate by itself: of its default size, or else of that."""
    from lycheedecode import Engine
    from lycheedecode.models.routing import supported_shape

    for build in (tiny.outline, tiny.make):
        try:
            model = build(architecture)
            supported_shape(model, None)
            if build is tiny.make:
                Engine(model)
        except LycheeError as error:
            return Outcome("refused", str(error))
        except ImportError as error:
            return Outcome("refused", f"transformers needs another package ({_brief(error)}).")
        except Exception:  # then what kept the small one from running says more
            continue
    return None


def _judged(differs: Any, model: nn.Module, right: tuple[Tensor, Tensor]) -> Outcome:
    try:
        why = differs(model, *right)
    except LycheeError as error:
        text = str(error)
        return Outcome("refused", text) if "\n" not in text else Outcome("error", f"not one sentence: {text}")
    except Exception as error:
        return Outcome("error", _brief(error))
    return Outcome("wrong", why) if why else Outcome("exact")


def _brief(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"


def prompts() -> list[Tensor]:
    """Two prompts of different lengths, int64 `[1, S]`."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, tiny.VOCAB, (1, size), generator=generator) for size in (PROMPT, PROMPT - SHORTER)]


def generated(model: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[T]` and logits `[T, V]` that the model's own `generate` gives."""
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ANSWER,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.sequences[0, prompt.shape[1] :], torch.cat(output.logits).float()


def plan_for(model: nn.Module) -> Any:
    """The heads of the first global layer are retrieval heads, and donors of all others."""
    from lycheedecode import HeadPlan
    from lycheedecode.models.shape import ModelShape

    shape = ModelShape.of(model)
    first = shape.global_layers[0] if shape.global_layers else 0
    return HeadPlan.from_donors(
        [
            [(first if layer in shape.global_layers else layer, head) for head in range(shape.num_kv_heads)]
            for layer in range(shape.num_layers)
        ]
    )


def hybrid_differs(model: nn.Module, tokens: Tensor, logits: Tensor) -> str:
    """What is wrong with `hybrid`; empty: nothing."""
    from lycheedecode import hybrid

    prompt, plan = prompts()[0], plan_for(model)
    with hybrid(model, plan, _config(4 * PROMPT)):
        found = generated(model, prompt)
    if not torch.equal(found[0], tokens) or _difference(found[1], logits) > TOLERANCE:
        return f"logits differ by {_difference(found[1], logits):.2g} standard deviations"
    with hybrid(model, plan, _config(12)):
        sparse = generated(model, prompt)[1]
    return "" if _difference(sparse, logits) > TOLERANCE else "a small budget changes nothing"


def engine_differs(model: nn.Module, tokens: Tensor, logits: Tensor) -> str:
    """What is wrong with `Engine`; empty: nothing."""
    from lycheedecode import Engine

    plan, (one, two) = plan_for(model), prompts()
    exact = {"plan": plan, "config": _config(4 * PROMPT)}
    other_tokens, other_logits = generated(model, two)
    batch = [row[0].tolist() for row in (one, two)]
    answers = torch.stack([tokens, other_tokens])
    runs = {
        "in one go": (Engine(model, **exact, prefill_chunk=PROMPT), batch[:1], answers[:1], logits[None]),
        "in chunks": (Engine(model, **exact, prefill_chunk=17), batch[:1], answers[:1], logits[None]),
        "padded": (Engine(model, **exact, prefill_chunk=17), batch, answers, torch.stack([logits, other_logits])),
        "full attention": (Engine(model), batch[:1], answers[:1], logits[None]),
    }
    for name, (engine, rows, answer, right) in runs.items():
        found = scored(engine, rows, answer)
        if _difference(found, right) > TOLERANCE:
            return f"{name}: logits differ by {_difference(found, right):.2g} standard deviations"
    sparse = scored(Engine(model, plan=plan, config=_config(12)), batch[:1], answers[:1])
    return "" if _difference(sparse, logits[None]) > TOLERANCE else "a small budget changes nothing"


def scored(engine: Any, rows: list[list[int]], answers: Tensor) -> Tensor:
    """Logits `[B, T, V]` of every token of the answers `[B, T]`."""
    context = engine.prefill(rows)
    first = context.logits[:, None].clone()
    return torch.cat([first, engine.score(context, answers[:, :-1])], 1)


def _config(budget: int) -> Any:
    from lycheedecode import HybridConfig

    return HybridConfig(budget_tokens=budget, block_size=4, sink_tokens=4, recent_tokens=4)


def _difference(found: Tensor, right: Tensor) -> float:
    difference = float((found - right).abs().max() / right.std())
    return difference if difference == difference else float("inf")
