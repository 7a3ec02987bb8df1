"""Engine: dense prefill, hybrid decode, Cache Correction, and the one generation loop.

    prefill            prompts -> Context: their KV cache and the logits of the first new token
    decode_one_token   Context + one token a sequence -> logits of the next
    score              Context + answers -> the logits of every answer token, decoded one by one
    generate, stream   prompts -> text

Dimensions as in `ops`; `T` tokens of an answer, `V` the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import DecodeAttention, FullAttention, HybridAttention
from ..checks import check_number, check_tokenizer, check_type, settings_from, shown
from ..config import ConfigLike, HybridConfig
from ..errors import ConfigError, InputError
from ..models.routing import Window, supported_shape
from ..models.shape import ModelError, inner_model, positions_of, vocabulary_of
from . import prefill
from .arguments import check_context, check_continued, check_length, check_rounds, check_step, check_unchanged
from .cache import KVCache
from .context import Context, left_padding
from .decoder import Decoder, Execution
from .generation import Generation, Piece, SequenceState, stop_token_ids
from .memory import prefill_chunk
from .offload import OffloadedAttention
from .offload.choice import CachePlace, check_place, new_cache
from .passes import correct
from .plans import PlanLike, plan_from
from .prefix import new_context, replace_prompts
from .prompt import PromptLike, encode, right_padded, stop_conditions
from .proof import prove
from .sampling import Sampling
from .single_steps import SingleSteps
from .verify import Rounds, draft_config, spare_slots

TokenIds = Tensor | Sequence[Sequence[int]]
"""int64 `[B, S]`, or one sequence of token ids for each prompt; lengths may differ."""


class Engine:
    """Decodes with a Hugging Face model and our attention; between calls, the model is unchanged.

    The model computes in its own dtype: autocast is off inside.

    >>> from lycheedecode import HybridConfig, Sampling
    >>> engine = Engine(model, tokenizer, plan=plan, config=HybridConfig(budget_tokens=64, block_size=16))
    >>> [result] = engine.generate("Once upon a time", max_new_tokens=8, sampling=Sampling(seed=0), ignore_eos=True)
    >>> len(result.token_ids), result.finish_reason
    (8, 'length')
    >>> pieces = [piece.text for piece in engine.stream("Once upon a time", max_new_tokens=8)]

    Args:
        model: a causal language model in eval mode.
        tokenizer: needed for text prompts, text results, stop strings and chat templates.
        plan: the donor of every KV head: a plan, its name or file, or `auto` (the model's known plan, or a new one,
            see `identify.auto`). None means full attention.
        config: how to decode, an object or a mapping such as `{"budget_tokens": 512}`; `correction_every` also works
            with full attention.
        attention: decode attention to use instead of a plan.
        prefill_chunk: prompt tokens that pass through the model at once; None: as many as memory allows.
        execution: `auto`: on a GPU, compile the decode step and replay it as a CUDA graph, if possible; `compiled`,
            `graph` or `eager` insist on one way (see `decoder`).
        backend: the `torch.compile` backend; None: ours, which is faster than "inductor" (`lycheedecode.fusion`).
        check: make sure, on a few tokens and once for each model, that prefill and decode steps reproduce the model's
            own logits, and refuse the model if they do not (see `proof`).
        cache: where keys and values are kept. `resident`: on the model's device. `host`: in host memory, except
            what retrieval heads scan and a store of selected blocks (`offload`). `auto`: in host memory if they do not
            fit on a GPU; resident without a GPU or a plan, and with settings that read the whole cache again and again
            (`retrieval_attention="full"`, `correction_every`, `verify_every`).
        store_ratio: with a cache in host memory, the blocks of each head that stay on the device, as a multiple of the
            budget.

    Raises:
        ModelError: the model's attention cannot be replaced, or the engine does not reproduce its logits.
        PlanError: the plan does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        plan: PlanLike = None,
        config: ConfigLike = None,
        attention: DecodeAttention | None = None,
        prefill_chunk: int | None = None,
        execution: Execution = "auto",
        backend: Any = None,
        check: bool = True,
        cache: CachePlace = "resident",
        store_ratio: float = 2.0,
    ) -> None:
        if plan is not None and attention is not None:
            raise ConfigError("Give a plan or an attention, not both.")
        if attention is not None and not hasattr(attention, "allocate"):
            raise ConfigError(f"attention must be a DecodeAttention or None, not {shown(attention)}.")
        if prefill_chunk is not None:
            check_number("prefill_chunk", prefill_chunk, 1)
        check_tokenizer(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.config = settings_from(HybridConfig, config, "config")
        plan = plan_from(plan, model, tokenizer, self.config)
        self.shape = supported_shape(model, plan)
        self._full = FullAttention(len(self.shape.global_layers), self.shape.num_kv_heads)
        self._place = check_place(cache, plan, self.config, store_ratio, self.device.type == "cuda")
        self.attention: DecodeAttention = attention or self._full
        if plan is not None and self._place == "resident":
            self.attention = HybridAttention(plan, draft_config(self.config), self.shape.global_layers)
        elif plan is not None:
            self.attention = OffloadedAttention(plan, self.config, self.shape.global_layers, store_ratio)
        self._prefill_chunk, self._windows = prefill_chunk, Window.of_layers(model, self.shape)
        self._decoder = Decoder(model, self.attention, self._windows, execution, backend, self.config)
        self._route = prefill.route(model)
        self._positions = positions_of(model)
        if check:
            prove(model, self.shape, self._windows)

    @property
    def device(self) -> torch.device:
        """Where token ids are expected: the device of the input embeddings."""
        return inner_model(self.model).get_input_embeddings().weight.device

    @property
    def _vocabulary(self) -> int:
        return vocabulary_of(self.model)

    @property
    def way(self) -> str:
        """How decode steps run: `compiled`, `graph` or `eager`."""
        return self._decoder.way

    # ------------------------------------------------------------------ phases

    def prefill(
        self, prompts: PromptLike | Sequence[PromptLike], room: int = 0, context: Context | None = None
    ) -> Context:
        """Read prompts with full attention.

        Args:
            prompts: as in `stream`; shorter ones are padded on the left and masked.
            room: cache slots to reserve now for tokens decoded later.
            context: a Context of as many earlier prompts, which these replace; a common prefix is not read again (see
                `prefix`).

        Returns:
            the Context that decode steps continue: `context`, if it was given.

        Raises:
            LycheeError: there is no prompt, or one is empty, exceeds the model's positions, or has a cache that does
                not fit into memory.
        """
        check_number("room", room, 0)
        rows = encode(prompts, self.tokenizer, vocabulary=self._vocabulary)
        lengths = [len(row) for row in rows]
        longest, padding = max(lengths), left_padding(lengths)
        check_length(longest, self.shape, self._positions)
        is_long = self._positions.is_long(longest)
        state = self._decoder.catch_up()
        if context is None:
            starts = None if padding is None else torch.tensor(padding, dtype=torch.int32, device=self.device)
            size = len(rows), longest + room
            asked = self._place, self.model, self.shape, *size, self._windows, starts, self.attention
            context = new_context(self.model, state, new_cache(*asked), len(rows), is_long)
        check_continued(context, self.model, len(rows))
        check_unchanged(context, state)
        sizes = len(rows), context.cache.missing(longest + room), context.cache.layers_in_prefill
        chunk_tokens = prefill_chunk(self.model, self.shape, *sizes, self._prefill_chunk)
        if is_long:
            chunk_tokens = longest  # the model looks at the last position of what it reads, and must see the prompt's
        began = self._now()
        unread = replace_prompts(context, rows, is_long, room)
        for chunk in unread.split(chunk_tokens, dim=1) if unread.shape[1] else ():
            context.take(chunk, self._dense(context.cache, chunk, padding))
        context.is_whole, context.prefill_seconds = True, self._now() - began
        return context

    def decode_one_token(self, context: Context, token_ids: Tensor) -> Tensor:
        """Feed one token for each sequence, int64 `[B]`; returns float32 `[B, V]`, the logits of the token after it.

        With Cache Correction, every n-th call is a dense pass over the last n tokens instead, which rewrites their
        cache entries and gives the logits. After a step that was interrupted, only `Context.rewind` helps.
        """
        if self.config.verify_every:
            raise ConfigError("Only generations verify: for single steps and scores, leave out verify_every.")
        check_step(context, token_ids, self.model, self._vocabulary)
        check_length(context.cache.length + 1, self.shape, self._positions, "With this token, the text")
        with context.step():
            if self._positions.turn:
                self._restore_prompts(context)
                context._decoded.append(token_ids.clone())
                if self._positions.is_long(context.cache.length + 1) != context.is_long:
                    return self._read_again(context)
            if self.config.correction_every:
                context._uncorrected.append(token_ids.clone())
                if len(context._uncorrected) >= self.config.correction_every:
                    return correct(context, self._decoder, self._full)
            return self._decoder.logits(context, token_ids).clone()

    def score(self, prompt: Context | TokenIds, answer_ids: TokenIds) -> Tensor:
        """Feed answers through decode steps, one token of each sequence at a time.

        Args:
            prompt: token ids of prompts, or a Context of this model; a Context is rewound before and after, so one
                prefill serves many engines.
            answer_ids: one answer for each prompt; shorter ones are padded on the right with token 0.

        Returns:
            float32 `[B, T, V]`: at t, the logits after answer token t. Those of the first one are `Context.logits`.
        """
        context = prompt if isinstance(prompt, Context) else self.prefill(prompt)
        check_context(context, self.model)
        check_unchanged(context, self._decoder.catch_up())
        answers = right_padded(answer_ids, self._vocabulary, self.device)
        if answers.shape[0] != len(context.prompt_lengths):
            raise InputError(f"There are {answers.shape[0]} answers for {len(context.prompt_lengths)} prompts.")
        context.rewind()
        context.cache.reserve(context.cache.length + answers.shape[1])
        logits = [self.decode_one_token(context, token_ids) for token_ids in answers.unbind(1)]
        context.rewind()
        return torch.stack(logits, 1)

    # ------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike] | Context,
        max_new_tokens: int = 256,
        *,
        context: Context | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        stop: str | int | Sequence[str | int] = (),
        chat: bool = False,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Generate for one or several prompts; arguments as in `stream`. Returns a `Generation` for each prompt."""
        how: dict[str, Any] = {"sampling": sampling, "stop": stop, "chat": chat, "ignore_eos": ignore_eos}
        pieces = self.stream(prompts, max_new_tokens, context=context, **how)
        finished = {piece.sequence: piece.generation for piece in pieces if piece.generation is not None}
        return [finished[sequence] for sequence in sorted(finished)]

    def stream(
        self,
        prompts: PromptLike | Sequence[PromptLike] | Context,
        max_new_tokens: int = 256,
        *,
        context: Context | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        stop: str | int | Sequence[str | int] = (),
        chat: bool = False,
        ignore_eos: bool = False,
    ) -> Iterator[Piece]:
        """Generate, a piece of text at a time.

        Args:
            prompts: one prompt or a list of them: strings, chats (lists of messages) or lists of token ids. Or a
                Context, which is rewound first, so one prefill serves many engines.
            max_new_tokens: limit for each prompt; the model's positions are a limit, too.
            context: a Context of earlier prompts, from `prefill`; what these prompts share with them is not read again.
            sampling: greedy by default; an object or a mapping such as `{"temperature": 0.7}`.
            stop: strings or token ids that end a sequence; strings are not part of its text.
            chat: wrap each string prompt as a user message in the tokenizer's chat template.
            ignore_eos: continue past the model's end tokens.

        Yields:
            a `Piece` whenever text of a sequence is certain; a sequence's last piece holds its `Generation`.
        """
        check_number("max_new_tokens", max_new_tokens, 1)
        for name, value in (("chat", chat), ("ignore_eos", ignore_eos)):
            check_type(name, value, bool)
        sampling = settings_from(Sampling, sampling, "sampling")
        if isinstance(prompts, Context):
            check_context(prompts, self.model)
            check_unchanged(prompts, self._decoder.catch_up())
        else:
            prompts = encode(prompts, self.tokenizer, chat, self._vocabulary)
        if context is not None:
            check_continued(context, self.model, None if isinstance(prompts, Context) else len(prompts))
        lengths = prompts.prompt_lengths if isinstance(prompts, Context) else [len(prompt) for prompt in prompts]
        texts, ends = stop_conditions(stop, self.tokenizer, self._vocabulary)
        if not ignore_eos:
            ends |= stop_token_ids(self.model, self.tokenizer)
        max_new_tokens = self._positions.new_tokens(max_new_tokens, max(lengths, default=0))
        return self._stream(prompts, context, max_new_tokens, sampling, ends, texts)

    def _stream(
        self,
        prompts: list[list[int]] | Context,
        context: Context | None,
        max_new_tokens: int,
        sampling: Sampling,
        ends: set[int],
        texts: list[str],
    ) -> Iterator[Piece]:
        room = max_new_tokens + (spare_slots(self.config) if self.config.verify_every else 0)
        context = prompts if isinstance(prompts, Context) else self.prefill(prompts, room, context)
        context.rewind()
        context.cache.reserve(context.cache.length + room)
        rows = [SequenceState(self.tokenizer, ends, texts, max_new_tokens) for _ in context.prompt_lengths]
        source: Rounds | SingleSteps
        if self.config.verify_every:
            check_rounds(context, max_new_tokens, self.model, self.shape, self._positions, self.config)
            self._restore_prompts(context)
            source = Rounds.over(self._decoder, self._full, context, sampling, self.config)
        else:
            source = SingleSteps(self, context, sampling, max_new_tokens)
        turn = context._turn
        for drawn, seconds in source.run():
            for sequence, (row, token_ids) in enumerate(zip(rows, drawn, strict=True)):
                if row.finish_reason is not None:
                    continue
                source.check(sequence, token_ids)
                piece = row.push_all(token_ids)
                if row.finish_reason is not None:
                    source.finish(sequence)
                    yield Piece(sequence, piece, self._result(context, sequence, row, seconds, source))
                elif piece:
                    yield Piece(sequence, piece)
            if all(row.finish_reason is not None for row in rows):
                return
            if context._turn != turn:  # whoever reads the pieces has used it in between
                raise InputError("Another generation over this Context began before this one ended: prefill two.")

    def _result(
        self, context: Context, sequence: int, row: SequenceState, seconds: float, source: Rounds | SingleSteps
    ) -> Generation:
        assert row.finish_reason is not None
        return Generation(
            token_ids=tuple(row.token_ids),
            text=row.text,
            finish_reason=row.finish_reason,
            prompt_tokens=context.prompt_lengths[sequence],
            cached_tokens=context.cached_tokens[sequence] if context.cached_tokens else 0,
            prefill_seconds=context.prefill_seconds,
            decode_seconds=seconds,
            **source.report(sequence),
            **context.memory(sequence),
        )

    # ------------------------------------------------------------------ several tokens at once

    def _dense(self, cache: KVCache, token_ids: Tensor, padding: list[int] | None) -> Tensor:
        """Tokens `[B, T]` -> logits float32 `[B, V]` after the last; every layer is dense."""
        chunk = prefill.ChunkAttention(self._windows, padding)
        logits = prefill.read_chunk(self.model, self._route, chunk, cache, token_ids)
        return logits[:, -1].clone()  # an ordinary tensor, which callers may change

    def _read_again(self, context: Context) -> Tensor:
        """Prompt and answer so far, the newest token included, with the positions of a text of this length.

        A text that grows past the model's turn has other frequencies from its first token on, and transformers'
        `generate` reads it again as well.
        """
        cache, length = context.cache, context.cache.length + 1
        if context.token_ids is None:
            raise ModelError(f"Only a prompt that this engine read can grow past {self._positions.turn} tokens.")
        context._uncorrected.clear()
        token_ids = torch.cat([context.token_ids, torch.stack(context._decoded, 1)], 1)
        logits = self._rewrite(context, token_ids, self._positions.is_long(length))
        self._full.count_bytes(context.kv_bytes, cache.token_counts(), None, True, cache.key_bytes)
        return logits

    def _restore_prompts(self, context: Context) -> None:
        """Give prompts their own positions again after a rewind, if what was decoded had passed the model's turn."""
        is_long = self._positions.is_long(max(context.prompt_lengths))
        if context._decoded or context.is_long == is_long or context.token_ids is None:
            return
        self._rewrite(context, context.token_ids, is_long)

    def _rewrite(self, context: Context, token_ids: Tensor, is_long: bool) -> Tensor:
        """Read tokens `[B, T]` from the first one on, in place of all entries; returns the logits after the last."""
        prompts, padding = (context.token_ids, context.prompt_lengths), context.padding
        context.hold_nothing()
        context.cache.truncate(0)
        context.is_long = is_long
        logits = self._dense(context.cache, token_ids, padding)
        context.token_ids, context.prompt_lengths = prompts
        context.is_whole = True
        return logits

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
