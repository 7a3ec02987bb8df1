"""Learning the gates: distillation from the full model, step by step, resumable at any of them.

step:  fresh prompts -> one dense prefill -> teacher and student replay the answers
       student head:  z * (retrieval output) + (1 - z) * (attention over its donor's blocks)
       loss:          distance from the teacher + Lagrangian of the expected share of open gates
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import HybridConfig
from ..plan import Head
from ..prompts.makers import Cell, PromptMaker
from .checkpoint import Checkpoint
from .donors import Reach
from .gates import GATES
from .objective import Lagrangian, hidden_loss, logit_loss
from .progress import Progress, Report, silent
from .replay import Seen, choose_blocks, full, over_blocks, prepare, replay
from .settings import IdentifySettings


class Gated:
    """A student with soft roles: every head mixes its two possible outputs by its gate.

    Args:
        z: `[L, Hkv]` gate values of this step.
        config: budget, blocks, form.
        donor_of: int64 `[H]`, the donor of each head of the global layers were it sparse; None: the same index of the
            layer before, whose own donor a sparse head passes on (the paper).
    """

    def __init__(self, z: Tensor, config: HybridConfig, donor_of: Tensor | None) -> None:
        self._z, self._config, self._donor_of = z, config, donor_of
        self._chosen: list[Tensor] = []  # a global layer each, bool [B, Hkv, T, N]
        self._carried: Tensor | None = None

    def __call__(self, layer: int, seen: Seen) -> Tensor:
        size = self._config.block_size
        own = choose_blocks(seen.weights.detach(), self._config)
        borrowed = self._borrow(layer, own)
        retrieval = full(layer, seen) if self._config.retrieval_attention == "full" else over_blocks(seen, own, size)
        z = self._z[layer].to(own.device)[:, None, None, None]
        return z * retrieval + (1 - z) * over_blocks(seen, borrowed, size)

    def _borrow(self, layer: int, own: Tensor) -> Tensor:
        if self._donor_of is None:
            borrowed = own if self._carried is None else self._carried.to(own.device)
            is_open = (self._z[layer].detach() > 0.5).to(own.device)[:, None, None]
            self._carried = torch.where(is_open, own, borrowed)
            return borrowed
        self._chosen.append(own)
        width, place = own.shape[1], len(self._chosen) - 1
        donors = self._donor_of[place * width : (place + 1) * width].tolist()
        return torch.stack([self._chosen[donor // width][:, donor % width].to(own.device) for donor in donors], 1)


class Trainer:
    """Trains the gates of one model.

    Args:
        model: frozen Hugging Face decoder.
        makers: a prompt maker for each text of `settings.train_cells`.
        settings: what to train and how.
        reach: which heads may serve which.
        coverage: `[head, donor]` from `measure_coverage`, needed unless donors are of the same index.
        checkpoint: keeps the state to resume from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        makers: dict[str, PromptMaker],
        settings: IdentifySettings,
        reach: Reach,
        coverage: Tensor | None,
        checkpoint: Checkpoint,
    ) -> None:
        self.model, self.makers, self.settings, self.reach = model, makers, settings, reach
        self._checkpoint = checkpoint
        self.device = model.get_input_embeddings().weight.device
        self.gates = GATES[settings.gates](reach.num_layers, reach.num_kv_heads).to(self.device)
        self.optimizer = torch.optim.AdamW(self.gates.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        fixed = torch.ones(reach.num_layers, reach.num_kv_heads, dtype=torch.bool)
        fixed[list(reach.layers)] = False
        for layer, head in reach.always_retrieval:
            fixed[layer, head] = True
        self.learnt = ~fixed.to(self.device)
        assert settings.num_retrieval_heads is not None, "settle(settings) comes first"
        wanted = settings.num_retrieval_heads - len(reach.always_retrieval)
        self.lagrangian = Lagrangian(
            wanted / int(self.learnt.sum()),
            settings.penalty,
            start=settings.multiplier,
            learning_rate=settings.multiplier_learning_rate,
        )
        self._coverage = None
        if settings.donors == "remapped":
            if coverage is None:
                raise ValueError("Training with remapped donors needs the coverage matrix.")
            itself = torch.eye(coverage.shape[0], dtype=torch.bool)
            self._coverage = coverage.masked_fill(~reach.matrix() | itself, -1.0)
        self.step = 0

    def run(self, report: Report = silent) -> Tensor:
        """Train to the end and return E[z], `[L, Hkv]`; heads that learn nothing have 1."""
        self._resume()
        while self.step < self.settings.steps:
            progress = self._train_one_step()
            self._save()
            report(progress)
        return self.gate_means()

    @torch.no_grad()
    def gate_means(self) -> Tensor:
        return torch.where(self.learnt, self.gates.mean(), 1.0).float().cpu()

    def _train_one_step(self) -> Progress:
        settings = self.settings
        rng = random.Random(f"{settings.seed}/{self.step}")
        noise = torch.Generator().manual_seed(rng.randrange(2**31))
        cell: Cell = rng.choice(settings.train_cells)
        lesson = prepare(self.model, cell.make(self.makers, settings.batch_size, rng), settings.prefill_chunk)

        z = torch.where(self.learnt, self.gates.sample(noise), 1.0)
        student = replay(self.model, lesson, Gated(z, settings.config, self._donors(z)))
        if settings.loss == "hidden":
            loss = hidden_loss(student, lesson.teacher, lesson.mask)
        else:
            loss = logit_loss(student, lesson.teacher, lesson.mask, self.model.get_output_embeddings())
        density = self.gates.open_probability()[self.learnt].mean()
        total = settings.loss_weight * loss + self.lagrangian.penalty(density, self.step / settings.steps)

        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(self.step, settings.steps)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        self.gates.constrain()
        self.step += 1
        means = self.gate_means()
        figures = {
            "loss": float(loss.detach()),
            "density": float(density.detach()),
            "open_heads": int((means > 0.5).sum()),
        }
        return Progress("train", self.step, settings.steps, figures, means)

    def _donors(self, z: Tensor) -> Tensor | None:
        """Each head's best donor among the heads that are open at this step."""
        if self._coverage is None:
            return None
        is_open = (z.detach() > 0.5)[list(self.reach.layers)].flatten().cpu()
        return self._coverage.masked_fill(~is_open, -0.5).where(self._coverage >= 0, -1.0).argmax(1)

    # ------------------------------------------------------------------ keeping and finding state

    def _save(self) -> None:
        tensors = {f"gates.{name}": value for name, value in self.gates.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in state.items()})
        tensors["progress"] = torch.tensor([self.step, *self.lagrangian.state()], dtype=torch.float64)
        self._checkpoint.save("gates", tensors)

    def _resume(self) -> None:
        tensors = self._checkpoint.load("gates")
        if tensors is None:
            return
        self.gates.load_state_dict({name: tensors[f"gates.{name}"] for name in self.gates.state_dict()})
        saved = self.optimizer.state_dict()
        for name, value in tensors.items():
            kind, *rest = name.split(".")
            if kind == "optimizer":
                saved["state"].setdefault(int(rest[0]), {})[rest[1]] = value
        self.optimizer.load_state_dict(saved)
        step, *constraint = tensors["progress"].tolist()
        self.step = int(step)
        self.lagrangian.restore(constraint)


def _schedule(step: int, steps: int, floor: float = 0.1) -> float:
    """Learning-rate factor: up over the first fifth of the steps, down over the last, never below `floor`."""
    fifth = max(steps / 5, 1)
    return max(floor, min(1.0, (step + 1) / fifth, (steps - step) / fifth))


def top_heads(means: Tensor, number: int, reach: Reach) -> list[Head]:
    """The `number` heads of global layers with the highest E[z], those that always retrieve first."""
    always = set(reach.always_retrieval)
    return sorted(sorted(reach.heads(), key=lambda head: (head not in always, -float(means[head])))[:number])
