"""A model class of lm-evaluation-harness that decodes with `Engine`; importing this module registers it.

    import lycheedecode.integrations.lm_eval
    lm_eval.simple_evaluate("lycheedecode", "pretrained=smollm2-135m,budget_tokens=512", tasks=[...])

One object may hold several engines of one model. All of them answer a batch of requests after a single prefill, each
answer is kept, and `chosen` says whose answers the harness gets: it can be run once for each engine, and decodes once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string
from torch import Tensor

from ..config import HybridConfig
from ..engine.engine import Context, Engine
from ..engine.prompt import right_padded
from ..engine.sampling import Sampling
from ..models.load import DEFAULT_MODEL, load_model
from ..models.shape import vocabulary_of
from ..plan import HeadPlan, bundled_plans
from ..roles import check_budgets
from .generation_kwargs import TaskRequestError, sampling_of


@dataclass(frozen=True)
class Answer:
    """What one engine answered to one request.

    Attributes:
        prompt_tokens: tokens of the prompt.
        text: what was generated, up to a stop string.
        tokens: tokens of the answer.
        kv_bytes_per_token: mean bytes of the KV cache that a decode step read; None where no step was needed.
        finish_reason: as in `Generation`.
        logprob, greedy: of a continuation: its log-probability, and whether each of its tokens is the most probable.
        skipped: why there is no answer.
    """

    prompt_tokens: int
    text: str | None = None
    tokens: int = 0
    kv_bytes_per_token: float | None = None
    finish_reason: str | None = None
    logprob: float | None = None
    greedy: bool | None = None
    skipped: str | None = None


Key = tuple[str, str]
"""`(name of the engine, key of the request)`."""


def request_key(task: str | None, document: int | None, index: int, number: int, arguments: Sequence[Any]) -> str:
    """What a request is known by: its place in its task, which of several samples it asks for, and all it says."""
    said = json.dumps([task, document, index, number, *arguments], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


@register_model("lycheedecode")
class LycheeLM(TemplateLM):
    """Answers requests with engines of one model.

    Args:
        engines: by name; they share model and tokenizer.
        batch_size: prompts decoded together.
        answers: what has been answered already, and where answers go as they come.
        seed: of sampling.
        max_new_tokens, temperature: replace what tasks ask for.
        report: told how many answers there are, and how many there will be, while requests are answered.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        batch_size: int = 1,
        answers: MutableMapping[Key, Answer] | None = None,
        seed: int = 0,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self.engines = dict(engines)
        self.chosen = next(iter(self.engines))
        self.answers: MutableMapping[Key, Answer] = {} if answers is None else answers
        self.batch_size = int(batch_size)
        self.templated = False
        self._seed, self._max_new_tokens, self._temperature = seed, max_new_tokens, temperature
        self._report, self._done, self._total = report, 0, 0
        engine = self.engines[self.chosen]
        self.tokenizer, self._device = engine.tokenizer, engine.device
        self.max_length = engine.shape.max_positions or None

    # ------------------------------------------------------------------ how the harness makes one

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> LycheeLM:
        """From `pretrained`, `plan` (`full`: full attention), `device`, `dtype`, `revision`, `batch_size`, `seed`,
        and any setting of `HybridConfig`."""
        given = {**arg_dict, **{name: value for name, value in (additional_config or {}).items() if value is not None}}
        given.pop("max_batch_size", None)
        own = {name: given.pop(name) for name in ("batch_size", "seed") if name in given}
        where: dict[str, Any] = {
            name: str(given.pop(name)) for name in ("device", "dtype", "revision") if name in given
        }
        name, plan = str(given.pop("pretrained", DEFAULT_MODEL)), given.pop("plan", None)
        if plan is None and name not in bundled_plans():
            raise TaskRequestError(f"There is no bundled head plan for {name!r}: give plan=FILE, or plan=full.")
        if str(own.get("batch_size", 1)).startswith("auto"):
            raise TaskRequestError("batch_size must be a number: the cache of a batch has to fit the longest prompts.")
        config = HybridConfig.from_dict(given)
        head_plan = None if plan == "full" else HeadPlan.load(plan or name)
        check_budgets(head_plan, config)
        model, tokenizer = load_model(name, **where)
        return cls(
            {"full" if head_plan is None else "hybrid": Engine(model, tokenizer, plan=head_plan, config=config)}, **own
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LycheeLM:
        """As `create_from_arg_obj`, from `name=value,...`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ------------------------------------------------------------------ text and tokens

    @property
    def engine(self) -> Engine:
        """The engine whose answers the harness gets."""
        return self.engines[self.chosen]

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.shape.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a prompt that went through the chat template has its special tokens already."""
        special = not self.templated if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special, verbose=False).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a chat; without a generation prompt its last message is left open, to be continued."""
        if not self.tokenizer.chat_template:
            raise TaskRequestError("This tokenizer has no chat template.")
        self.templated = True
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text for each request; an empty one for a request that was skipped (see its `Answer`)."""
        keys = _keys(requests)
        open_requests = self._unanswered(keys)
        prompts = {key: self.tok_encode(request.args[0]) for key, request in open_requests.items()}
        wanted = {key: self._generation(request.args[1]) for key, request in open_requests.items()}
        fitting = []
        for key, (sampling, most, stop) in wanted.items():
            if self._fits(key, len(prompts[key]), most):
                fitting.append((str((sampling, most, stop)), -len(prompts[key]), key))
        for _, group in groupby(sorted(fitting), key=lambda entry: entry[0]):
            for batch in _batches([key for *_, key in group], self.batch_size):
                self._generate(batch, [prompts[key] for key in batch], *wanted[batch[0]])
        return [self.answers[self.chosen, key].text or "" for key in keys]

    def _generate(
        self, keys: list[str], prompts: list[list[int]], sampling: Sampling, most: int, stop: list[str]
    ) -> None:
        sampling = replace(sampling, seed=int(hashlib.sha256(f"{self._seed}{keys[0]}".encode()).hexdigest()[:12], 16))
        context = self.engine.prefill(self._filled_up(prompts), room=most)
        for name in self._engines_without(keys):
            results = self.engines[name].generate(context, most, sampling=sampling, stop=stop)
            for key, result in zip(keys, results, strict=False):
                self.answers[name, key] = Answer(
                    prompt_tokens=result.prompt_tokens,
                    text=result.text,
                    tokens=len(result.token_ids),
                    kv_bytes_per_token=result.kv_bytes_per_token or None,
                    finish_reason=result.finish_reason,
                )
            self._advance(len(keys))

    def _filled_up(self, prompts: list[list[int]]) -> list[list[int]]:
        """A batch of the usual size where steps are compiled: compiling one for the last prompts would take longer."""
        compiled = any(engine.way == "compiled" for engine in self.engines.values())
        return prompts + [prompts[-1]] * (self.batch_size - len(prompts)) if compiled else prompts

    def _generation(self, said: dict[str, Any]) -> tuple[Sampling, int, list[str]]:
        """Sampling, most new tokens and stop strings of a request."""
        kwargs = dict(normalize_gen_kwargs(said))
        sampling = sampling_of(kwargs, self._temperature)
        most = self._max_new_tokens or int(kwargs["max_gen_toks"])
        return sampling, most, [text for text in kwargs["until"] if text]

    # ------------------------------------------------------------------ likelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding would say.

        Contexts are prefilled densely, once for all their continuations; these pass through decode steps.
        """
        keys = _keys(requests)
        contexts: dict[tuple[int, ...], list[tuple[str, list[int]]]] = {}
        for key, request in self._unanswered(keys).items():
            context, continuation = self._encoded(*request.args)
            if self._fits(key, len(context), len(continuation)):
                contexts.setdefault(tuple(context), []).append((key, continuation))
        for batch in _batches(sorted(contexts, key=len, reverse=True), self.batch_size):
            self._score(batch, [contexts[context] for context in batch])
        found = (self.answers[self.chosen, key] for key in keys)
        return [(float("-inf") if one.logprob is None else one.logprob, bool(one.greedy)) for one in found]

    def _score(self, contexts: list[tuple[int, ...]], continuations: list[list[tuple[str, list[int]]]]) -> None:
        keys = [key for row in continuations for key, _ in row]
        context = self.engine.prefill(contexts, room=max(len(ids) for row in continuations for _, ids in row))
        for name in self._engines_without(keys):
            for turn in range(max(map(len, continuations))):
                rows = [row[min(turn, len(row) - 1)] for row in continuations]
                scored = _likelihoods(self.engines[name], context, [ids for _, ids in rows])
                for i, (key, answer) in enumerate(zip((key for key, _ in rows), scored, strict=True)):
                    if turn < len(continuations[i]):
                        self.answers[name, key] = answer
            self._advance(len(keys))

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return [self.prefix_token_id], ids

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("`loglikelihood` does without it.")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused: it would read whole texts in the prefill, which is dense under every policy."""
        raise TaskRequestError(
            "Tasks that score whole texts (loglikelihood_rolling) say nothing about decoding: prefill is dense."
        )

    # ------------------------------------------------------------------ what is still to do

    def _unanswered(self, keys: Mapping[str, Instance]) -> dict[str, Instance]:
        found = {key: request for key, request in keys.items() if self._engines_without([key])}
        self._done, self._total = 0, len(found) * len(self.engines)
        return found

    def _advance(self, number: int) -> None:
        self._done += number
        self._report(self._done, self._total)

    def _engines_without(self, keys: Iterable[str]) -> list[str]:
        return [name for name in self.engines if any((name, key) not in self.answers for key in keys)]

    def _fits(self, key: str, prompt_tokens: int, room: int) -> bool:
        """Whether prompt and answer fit the model's positions; if not, every engine skips the request."""
        needed = prompt_tokens + room
        reason = None
        if self.max_length is not None and needed > self.max_length:
            reason = f"{prompt_tokens} tokens and {room} for the answer; the model has {self.max_length} positions"
        elif not prompt_tokens or not room:
            reason = "an empty prompt or continuation"
        if reason is not None:
            for name in self.engines:
                self.answers[name, key] = Answer(prompt_tokens, skipped=reason)
            self._advance(len(self.engines))
        return reason is None


def _keys(requests: list[Instance]) -> dict[str, Instance]:
    """Requests by key, in order; the harness repeats a request for each sample that it wants."""
    seen: dict[int, int] = {}
    keys = {}
    for request in requests:
        number = seen[id(request)] = seen.get(id(request), -1) + 1
        keys[request_key(request.task_name, request.doc_id, request.idx, number, request.args)] = request
    return keys


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _likelihoods(engine: Engine, context: Context, continuations: list[list[int]]) -> list[Answer]:
    """Feed one continuation for each prompt through decode steps; shorter ones are padded with token 0.

    Not `Engine.score`, which would keep the logits of every token until the end.
    """
    lengths = torch.tensor([len(ids) for ids in continuations])
    ids, longest = right_padded(continuations, vocabulary_of(engine.model), engine.device), int(lengths.max())
    context.rewind()
    context.cache.reserve(context.cache.length + longest)
    found = [_token_scores(context.logits, ids[:, 0])]
    kv_bytes = torch.zeros(longest, len(continuations), dtype=torch.float64)
    for t in range(1, longest):
        found.append(_token_scores(engine.decode_one_token(context, ids[:, t - 1]), ids[:, t]))
        kv_bytes[t] = context.kv_bytes.cpu()
    logprobs = torch.stack([logprob for logprob, _ in found], 1).cpu()
    greedy = torch.stack([hit for _, hit in found], 1).cpu()
    answers = []
    for i, length in enumerate(lengths.tolist()):
        steps = length - 1
        answers.append(
            Answer(
                prompt_tokens=context.prompt_lengths[i],
                tokens=length,
                kv_bytes_per_token=float(kv_bytes[steps, i]) / steps if steps else None,
                logprob=float(logprobs[i, :length].sum()),
                greedy=bool(greedy[i, :length].all()),
            )
        )
    context.rewind()
    return answers


def _token_scores(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's token, and whether it is the most probable: `[B]` each."""
    logprobs = logits.double().log_softmax(-1)
    return logprobs.gather(-1, ids[:, None])[:, 0], logits.argmax(-1) == ids
