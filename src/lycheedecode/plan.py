"""HeadPlan: which donor every KV head has. A head that is its own donor is a retrieval head."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from math import inf
from operator import index
from pathlib import Path
from typing import Any

from .checks import shown, unknown
from .errors import LycheeError
from .files import write_whole

FORMAT = "lycheedecode-head-plan/1"
FORMAT_OF_BUDGETS = "lycheedecode-head-plan/2"
"""The format of plans with budgets: versions that do not know them refuse to read it."""
_PARTS = ("format", "model", "donors", "gate_means", "completion", "budgets", "provenance")
Head = tuple[int, int]
"""`(layer, KV head)`."""
MOST_FACTOR = 1000
"""The largest factor of completion, and of a budget."""


class PlanError(LycheeError):
    """A head plan that cannot be read, is not valid, or does not fit the model; the message is one sentence.

    >>> HeadPlan.from_donors([[(1, 0)], [(1, 0)]])
    Traceback (most recent call last):
    lycheedecode.plan.PlanError: The donor (1, 0) of layer 0, KV head 0 is in a later layer: its selection ...
    """


@dataclass(frozen=True)
class HeadPlan:
    """The donor of every KV head of a model.

    The plan is valid when every donor is a retrieval head (its own donor) of the same or an earlier layer, so that a
    single pass over the layers can select before it attends.

    >>> plan = HeadPlan.from_donors([[(0, 0), (0, 0)], [(0, 0), (1, 1)]])  # two layers of two KV heads
    >>> plan.retrieval
    ((0, 0), (1, 1))
    >>> plan.save(folder / "plan.json")
    >>> HeadPlan.load(folder / "plan.json") == plan
    True

    Attributes:
        donors: `L x Hkv` pairs `(layer, KV head)`.
        model: the model it was made for: `name`, `revision`, `architecture` (any may be missing).
        gate_means: `L x Hkv` expected gate values from identification, or None.
        provenance: how the plan was made: data, seed, steps, settings, versions.
        completion: `L x Hkv` factors from 0 to 1000: the weight of the tokens that a head leaves unread, represented by
            their chunk's mean key and value. 0: they do not count. None completes nothing. `provenance["completion"]`
            says what they were fitted for: `chunk` (tokens) and, if it was fixed, `budget_tokens`.
        budgets: `L x Hkv` factors on the config's budget, above 0: how many of its donor's best blocks a head reads.
            None: 1 for every head; a table of ones becomes None.
    """

    donors: tuple[tuple[Head, ...], ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    gate_means: tuple[tuple[float, ...], ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    completion: tuple[tuple[float, ...], ...] | None = None
    budgets: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "donors", _as_donors(self.donors))
        for layer, row in enumerate(self.donors):
            for head, donor in enumerate(row):
                self._check_donor(layer, head, donor)
        for name in ("gate_means", "completion", "budgets"):
            object.__setattr__(self, name, self._as_table(name, getattr(self, name)))
        if self.completion is not None and not all(
            0 <= factor <= MOST_FACTOR for row in self.completion for factor in row
        ):
            raise PlanError(f"completion must be a table of factors that are not negative, and at most {MOST_FACTOR}.")
        if self.budgets is not None and not all(0 < factor <= MOST_FACTOR for row in self.budgets for factor in row):
            raise PlanError(f"budgets must be a table of factors above 0, and at most {MOST_FACTOR}.")
        if self.budgets is not None and all(factor == 1 for row in self.budgets for factor in row):
            object.__setattr__(self, "budgets", None)

    def __hash__(self) -> int:
        return hash(self.donors)  # the other attributes of equal plans are equal, but not all of them can be hashed

    def _as_table(self, name: str, table: Any) -> tuple[tuple[float, ...], ...] | None:
        """`L x Hkv` numbers, or None."""
        if table is None:
            return None
        try:
            numbers = tuple(tuple(_as_number(number) for number in row) for row in table)
        except (TypeError, ValueError, OverflowError):
            raise PlanError(f"{name} must be a table of finite numbers, a row for each layer.") from None
        if [len(row) for row in numbers] != [len(row) for row in self.donors]:
            raise PlanError(f"{name} must have the shape of donors, {self.num_layers} x {self.num_kv_heads}.")
        return numbers

    def _check_donor(self, layer: int, head: int, donor: Head) -> None:
        donor_layer, donor_head = donor
        where = f"layer {layer}, KV head {head}"
        if not (0 <= donor_layer < self.num_layers and 0 <= donor_head < self.num_kv_heads):
            raise PlanError(
                f"The donor {donor} of {where} does not exist in a plan of {self.num_layers} layers "
                f"and {self.num_kv_heads} KV heads."
            )
        if donor_layer > layer:
            raise PlanError(f"The donor {donor} of {where} is in a later layer: its selection would come too late.")
        if self.donors[donor_layer][donor_head] != donor:
            raise PlanError(f"The donor {donor} of {where} is not a retrieval head (it is not its own donor).")

    # ------------------------------------------------------------------ reading the plan

    @property
    def num_layers(self) -> int:
        """Layers of the model, `L`."""
        return len(self.donors)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of each layer, `Hkv`."""
        return len(self.donors[0])

    @cached_property
    def retrieval(self) -> tuple[Head, ...]:
        """All retrieval heads in layer order."""
        return tuple(
            (layer, head)
            for layer, row in enumerate(self.donors)
            for head, donor in enumerate(row)
            if donor == (layer, head)
        )

    @cached_property
    def selections(self) -> tuple[tuple[Head, float], ...]:
        """All that is selected in a step: retrieval heads in layer order, once for each budget factor of their readers.

        A position in this tuple is a row of the selections. Without budgets, each retrieval head has one row.
        """
        every = zip(self.donors, map(self.budget_factors, range(self.num_layers)), strict=True)
        return tuple(sorted({pair for donors, factors in every for pair in zip(donors, factors, strict=True)}))

    @cached_property
    def _rows(self) -> dict[tuple[Head, float], int]:
        return {pair: row for row, pair in enumerate(self.selections)}

    def retrieval_heads(self, layer: int) -> tuple[int, ...]:
        """KV heads of `layer` that select."""
        return tuple(head for head_layer, head in self.retrieval if head_layer == layer)

    def sparse_heads(self, layer: int) -> tuple[int, ...]:
        """KV heads of `layer` that only attend."""
        return tuple(head for head in range(self.num_kv_heads) if self.donors[layer][head] != (layer, head))

    def first_row(self, layer: int) -> int:
        """The first of the rows that `layer` selects; rows count through the layers, as in `selections`."""
        return sum(head[0] < layer for head, _ in self.selections)

    def rows(self, layer: int) -> tuple[tuple[int, float], ...]:
        """For each row that `layer` selects, from `first_row(layer)` on: its KV head and its factor on the budget."""
        return tuple((head[1], factor) for head, factor in self.selections if head[0] == layer)

    def donor_rows(self, layer: int) -> tuple[int, ...]:
        """For every KV head of `layer`, the row whose selection it attends over."""
        pairs = zip(self.donors[layer], self.budget_factors(layer), strict=True)
        return tuple(self._rows[pair] for pair in pairs)

    def completion_factors(self, layer: int) -> tuple[float, ...]:
        """For every KV head of `layer`, the factor of its completion; zeros where the plan has none."""
        return (0.0,) * self.num_kv_heads if self.completion is None else self.completion[layer]

    def budget_factors(self, layer: int) -> tuple[float, ...]:
        """For every KV head of `layer`, the factor on its budget; ones where the plan has none."""
        return (1.0,) * self.num_kv_heads if self.budgets is None else self.budgets[layer]

    # ------------------------------------------------------------------ making plans

    @classmethod
    def from_donors(cls, donors: Sequence[Sequence[Sequence[int]]], **details: Any) -> HeadPlan:
        """A plan from an `L x Hkv` table of `(layer, KV head)` pairs; `details` are the other attributes."""
        return cls(donors=donors, **details)  # type: ignore[arg-type]  # __post_init__ makes tuples of it

    @classmethod
    def all_retrieval(cls, num_layers: int, num_kv_heads: int, **details: Any) -> HeadPlan:
        """Every head selects for itself."""
        return cls.same_index(((layer, head) for layer in range(num_layers) for head in range(num_kv_heads)),
                              num_layers, num_kv_heads, **details)  # fmt: skip

    @classmethod
    def same_index(cls, retrieval: Any, num_layers: int, num_kv_heads: int, **details: Any) -> HeadPlan:
        """The paper's inheritance: a sparse head reuses the nearest earlier retrieval head of its own index.

        `retrieval` is an iterable of `(layer, KV head)`; all of layer 0 is always among them.
        """
        chosen = {(int(layer), int(head)) for layer, head in retrieval}
        for layer, head in sorted(chosen):
            if not (0 <= layer < num_layers and 0 <= head < num_kv_heads):
                raise PlanError(
                    f"The retrieval head {(layer, head)} does not exist in a plan of {num_layers} layers and "
                    f"{num_kv_heads} KV heads."
                )
        donors: list[list[Head]] = []
        for layer in range(num_layers):
            donors.append(
                [
                    (layer, head) if layer == 0 or (layer, head) in chosen else donors[layer - 1][head]
                    for head in range(num_kv_heads)
                ]
            )
        return cls.from_donors(donors, **details)

    # ------------------------------------------------------------------ files

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> HeadPlan:
        """Read a plan: a JSON file by its path, or a bundled plan by its own name or its model's.

        A name is one word or a hub id (`owner/name`); anything else is a path.
        """
        if not isinstance(name_or_path, (str, os.PathLike)):
            raise PlanError(f"A head plan is loaded by name or path, not from {shown(name_or_path)}.")
        name = os.fspath(name_or_path)
        path = Path(name)
        is_name = not path.is_file() and re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+(?<!\.json)", name)
        if is_name and (bundled := bundled_plan_of(name)) is not None:
            return bundled
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise PlanError(
                f"There is no head plan file {name!r}, and no bundled plan of that name "
                f"(bundled: {', '.join(bundled_plans()) or 'none'})."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"The head plan {name!r} cannot be read: {_reason(error)}.") from None
        return cls.from_json(text, source=name)

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any], source: str = "head plan") -> HeadPlan:
        """A plan from its JSON text or the parsed object."""
        try:
            data = json.loads(text) if isinstance(text, str) else text
        except json.JSONDecodeError as error:
            raise PlanError(f"{source}: not valid JSON (line {error.lineno}: {error.msg}).") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets by the thousand
            raise PlanError(f"{source}: not JSON that can be read ({str(error).split(';')[0]}).") from None
        if not isinstance(data, Mapping) or "donors" not in data:
            raise PlanError(f"{source}: not a head plan (it has no 'donors').")
        if data.get("format") not in (FORMAT, FORMAT_OF_BUDGETS):
            known = f"{FORMAT!r} or {FORMAT_OF_BUDGETS!r}"
            raise PlanError(f"{source}: format must be {known}, not {shown(data.get('format'))}.")
        for said in unknown(data, _PARTS):  # a slip in a name would leave out what it names
            raise PlanError(f"{source}: a head plan has no {said}.")
        if data["format"] == FORMAT and data.get("budgets") is not None:
            raise PlanError(f"{source}: budgets need format {FORMAT_OF_BUDGETS!r}: older versions would ignore them.")
        for key in ("model", "provenance"):
            if not isinstance(data.get(key) or {}, Mapping):
                raise PlanError(f"{source}: {key} must be an object, not {data[key]!r}.")
        model = dict(data.get("model") or {})
        shape = {key: model.pop(key, None) for key in ("num_layers", "num_kv_heads")}
        try:
            provenance = dict(data.get("provenance") or {})
            tables = data.get("completion"), data.get("budgets")
            plan = cls(data["donors"], model, data.get("gate_means"), provenance, *tables)
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from None
        except (TypeError, ValueError) as error:
            raise PlanError(f"{source}: {_reason(error)}.") from None
        for key, said in shape.items():
            if said is not None and said != getattr(plan, key):
                raise PlanError(f"{source}: says {key} = {shown(said)}, but its donors have {getattr(plan, key)}.")
        return plan

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "format": FORMAT if self.budgets is None else FORMAT_OF_BUDGETS,
            "model": {**self.model, "num_layers": self.num_layers, "num_kv_heads": self.num_kv_heads},
            "donors": [[list(donor) for donor in row] for row in self.donors],
            "gate_means": None if self.gate_means is None else [[round(m, 4) for m in row] for row in self.gate_means],
            **({} if self.completion is None else {"completion": [list(row) for row in self.completion]}),
            **({} if self.budgets is None else {"budgets": [list(row) for row in self.budgets]}),
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON: all of it or, when interrupted, nothing. Raises `OutputError`."""
        write_whole(Path(path), _dump(self.to_json()))

    # ------------------------------------------------------------------ fitting a model

    def check_fits(self, *, num_layers: int, num_kv_heads: int, architecture: str | None = None) -> None:
        """Raise `PlanError` if the model is another one; its sentence says what differs."""
        made_for = self.model.get("name") or "another model"
        for what, ours, theirs in (
            ("layers", self.num_layers, num_layers),
            ("KV heads per layer", self.num_kv_heads, num_kv_heads),
            ("architecture", self.model.get("architecture"), architecture),
        ):
            if ours is not None and theirs is not None and ours != theirs:
                unit = f"{ours} {what}" if isinstance(ours, int) else f"{what} {ours}"
                raise PlanError(f"This head plan is for {made_for} with {unit}; the model has {theirs}.")

    def shard(self, rank: int, world: int) -> HeadPlan:
        """The plan of one tensor-parallel rank, which holds a contiguous range of every layer's KV heads.

        Raises `PlanError` when the heads do not divide evenly or a donor is on another rank.
        """
        if not 0 <= rank < world:
            raise PlanError(f"Rank {rank} does not exist in a group of {world}.")
        if self.num_kv_heads % world:
            raise PlanError(f"{self.num_kv_heads} KV heads cannot be divided evenly over {world} ranks.")
        size = self.num_kv_heads // world
        first = rank * size
        donors = []
        for layer, row in enumerate(self.donors):
            for head in range(first, first + size):
                if row[head][1] // size != rank:
                    raise PlanError(
                        f"The donor {row[head]} of layer {layer}, KV head {head} is on tensor-parallel rank "
                        f"{row[head][1] // size}, not {rank}: identify again with donors kept inside {world} shards."
                    )
            donors.append([(donor[0], donor[1] - first) for donor in row[first : first + size]])
        tables = {name: table and [row[first : first + size] for row in table] for name, table in self._tables.items()}
        return HeadPlan.from_donors(
            donors, model=self.model, provenance={**self.provenance, "shard": [rank, world]}, **tables
        )

    def stage(self, first: int, last: int) -> HeadPlan:
        """The plan of one pipeline stage, layers `first` to `last - 1`; raises `PlanError` if a donor is outside it."""
        if not 0 <= first < last <= self.num_layers:
            raise PlanError(f"Layers {first} to {last - 1} do not exist in a plan of {self.num_layers} layers.")
        for layer in range(first, last):
            for head, donor in enumerate(self.donors[layer]):
                if donor[0] < first:
                    raise PlanError(
                        f"The donor {donor} of layer {layer}, KV head {head} is in an earlier pipeline stage than "
                        f"layers {first} to {last - 1}: identify again with donors kept inside stages."
                    )
        donors = [[(donor[0] - first, donor[1]) for donor in row] for row in self.donors[first:last]]
        tables = {name: table and table[first:last] for name, table in self._tables.items()}
        return HeadPlan.from_donors(
            donors, model=self.model, provenance={**self.provenance, "stage": [first, last]}, **tables
        )

    @property
    def _tables(self) -> dict[str, tuple[tuple[float, ...], ...] | None]:
        """What there is for every head besides its donor."""
        return {"gate_means": self.gate_means, "completion": self.completion, "budgets": self.budgets}


def bundled_plans() -> list[str]:
    """Names of the plans that ship with the package."""
    folder = resources.files("lycheedecode") / "plans"
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def bundled_plan_of(model: str) -> HeadPlan | None:
    """The plan that ships for a model, by the model's name, hub id, folder or file: `smollm2-135m` is that of
    `HuggingFaceTB/SmolLM2-135M-Instruct` and of `/models/SmolLM2-135M-Instruct.Q4_1.gguf`. None where there is none.

    A name is no proof: `check_fits` says whether the plan fits.
    """
    said = model.lower().replace("_", "-")
    for name in sorted(bundled_plans(), key=len, reverse=True):
        if re.search(rf"(?<![a-z0-9.]){re.escape(name)}(?![a-z0-9])", said):
            text = (resources.files("lycheedecode") / "plans" / f"{name}.json").read_text(encoding="utf-8")
            return HeadPlan.from_json(text, source=name)
    return None


def _as_donors(table: Any) -> tuple[tuple[Head, ...], ...]:
    try:
        donors = tuple(tuple((index(layer), index(head)) for layer, head in row) for row in table)
    except (TypeError, ValueError):
        raise PlanError("donors must be a table of (layer, KV head) pairs, a row for each layer.") from None
    if not donors or not donors[0] or len({len(row) for row in donors}) != 1:
        raise PlanError("donors must have at least one layer, and the same number of KV heads in every layer.")
    return donors


def _as_number(value: Any) -> float:
    """Refuses what `float` would take as well: words, such as the digits of "12", and true or false."""
    if isinstance(value, (str, bytes, bool)) or not abs(float(value)) < inf:
        raise ValueError(value)
    return float(value)


def _dump(data: dict[str, Any]) -> str:
    """JSON with a line for each layer, so that a plan can be read and compared by eye."""
    lines = []
    for key, value in data.items():
        if key in ("donors", "gate_means", "completion", "budgets") and value is not None:
            rows = ",\n".join("    " + json.dumps(row) for row in value)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            body = json.dumps(value, indent=2).replace("\n", "\n  ")
            lines.append(f"  {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).rstrip(".")
