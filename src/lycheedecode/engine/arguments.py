"""What the engine's phases refuse, in one sentence each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import shown
from ..config import HybridConfig
from ..errors import ConfigError, InputError
from ..models.positions import Positions
from ..models.shape import ModelShape, inner_model, text_config
from ..models.state import ModelState
from .context import Context
from .prompt import check_token_ids
from .verify import spare_slots


def check_context(context: Context, model: nn.Module) -> None:
    """Refuse what is not a Context, half of one, or one of another model, whose keys mean something else."""
    _check_reader(context, model)
    if not context.is_whole:
        raise InputError(
            "Reading the prompts of this Context was interrupted: give the prompts, and this Context as context=."
        )


def check_continued(context: Context, model: nn.Module, sequences: int | None) -> None:
    """Refuse a Context that cannot take up other prompts, `sequences` of them; None: they are a Context themselves."""
    _check_reader(context, model)
    held = len(context.prompt_lengths)
    if sequences is None:
        raise InputError("context= goes on with other prompts: give text, messages or token ids beside it.")
    if sequences != held:
        raise InputError(f"A Context of {held} prompt{'s' * (held > 1)} goes on with as many, not with {sequences}.")
    if context.token_ids is None:
        raise InputError("Only a Context of which prefill read the prompts can go on with others.")


def _check_reader(context: Context, model: nn.Module) -> None:
    if not isinstance(context, Context):
        raise InputError(f"prefill makes the Context that is needed here; this is {shown(context)}.")
    if context.model is not None and context.model is not inner_model(model):
        raise InputError("This Context was read by another model; only engines of one model can share it.")


def check_unchanged(context: Context, state: ModelState) -> None:
    """Refuse a Context whose keys and values come from what the model, now in `state`, was before it was changed."""
    if context.model_state is not None and context.model_state != state:
        raise InputError("The model was changed after it had read this Context: prefill another one.")


def check_step(context: Context, token_ids: Tensor, model: nn.Module, vocabulary: int) -> None:
    """Refuse a Context as above or in the middle of a step, and what is not one token of the vocabulary a sequence."""
    check_context(context, model)
    if context._in_step:
        raise InputError("A decode step over this Context did not end: rewind() it and feed its tokens again.")
    sequences = len(context.prompt_lengths)
    whole = isinstance(token_ids, Tensor) and token_ids.dtype in (torch.int64, torch.int32)
    if not whole or token_ids.shape != (sequences,):
        given = f"{token_ids.dtype} {list(token_ids.shape)}" if isinstance(token_ids, Tensor) else shown(token_ids)
        raise InputError(f"decode_one_token takes one token a sequence, int64 [{sequences}], not {given}.")
    if not token_ids.is_cuda:  # a GPU would have to be waited for
        check_token_ids([token_ids.tolist()], vocabulary)


def check_length(tokens: int, shape: ModelShape, positions: Positions, what: str = "The prompt") -> None:
    """Refuse texts longer than the model's positions."""
    if 0 < shape.max_positions < tokens:
        raise InputError(f"{what} has {tokens} tokens; the model has {shape.max_positions} positions.")
    if positions.kind == "dynamic" and tokens > positions.turn:
        raise InputError(
            f"Dynamic scaling of positions changes with every token past {positions.turn}, which Engine "
            f"cannot follow; this text has {tokens}."
        )


def check_rounds(
    context: Context,
    max_new_tokens: int,
    model: nn.Module,
    shape: ModelShape,
    positions: Positions,
    config: HybridConfig,
) -> None:
    """Refuse rounds (`verify_every`) where tokens of one pass would need positions of different kinds."""
    turn, first = positions.turn, context.cache.length
    if turn and first <= turn < first + max_new_tokens + spare_slots(config):
        raise ConfigError(
            f"Positions of {shape.architecture} change at {turn} tokens, which verify_every cannot cross: "
            "leave it out, or stay on one side."
        )
    if len(context.prompt_lengths) > 1 and getattr(text_config(inner_model(model)), "attn_temperature_tuning", False):
        raise ConfigError(
            f"{shape.architecture} scales attention by the length of the whole batch; with verify_every give "
            "one prompt at a time."
        )
