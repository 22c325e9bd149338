# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""KE: a network that reads an edit and gates its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim import RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_edit.core.batch import pad_rows
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import ends_whole, whole_tensor
from lightning_edit.evaluation.evaluator import Evaluation, Evaluator
from lightning_edit.functional.ke import ke_factors
from lightning_edit.functional.label_smoothing import smoothed_nll
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.meta_learning.factors import Factors, Gradients, Positions, grouped
from lightning_edit.modules.meta_learning.hypernetwork import HyperEditModule
from lightning_edit.modules.meta_learning.objectives import Objective
from lightning_edit.modules.meta_learning.training_batch import TrainOn
from lightning_edit.optim import E

__all__ = ["KE"]

LONGEST = 32  # tokens of the text that stands for an edit
SAID = 8  # tokens of the model's own answer
WELL_FLIPPED = 0.9
TIGHTER = 0.8


class KENetwork(nn.Module):
    """A bidirectional LSTM over the text of an edit, and a head for each matrix.

    Args:
        sites: The matrices.
        embeddings: Width of the token embeddings.
        hidden: Width of the LSTM, each way, and of the heads' inner layers.
        condition: Width of what stands for an edit.
        margin: The divergence that is allowed at the beginning.
        table: Token embeddings to train; those of the language model are read if None.
    """

    margin: Tensor

    def __init__(
        self,
        sites: Sequence[WeightSite],
        embeddings: int,
        hidden: int,
        condition: int,
        margin: float,
        table: Tensor | None,
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(embeddings, hidden, bidirectional=True, batch_first=True)
        self.condition = nn.Linear(2 * hidden, condition)
        self.heads = nn.ModuleList(
            nn.Sequential(
                weight_norm(nn.Linear(condition, hidden)),
                nn.Tanh(),
                weight_norm(nn.Linear(hidden, 2 * (site.in_features + site.out_features) + 1)),
            )
            for site in sites
        )
        self.multiplier = nn.Parameter(torch.ones(()))
        # Last, so that the others begin with the same numbers whether it is trained or not.
        self.embeddings = None if table is None else nn.Embedding(*table.shape)
        if self.embeddings is not None:
            self.embeddings.weight.data.copy_(cast(Tensor, table))
        self.register_buffer("margin", torch.tensor(margin))

    @override
    def forward(self, embedded: Tensor, lengths: Tensor) -> list[Tensor]:
        """Codes of edits.

        Args:
            embedded: Tokens of their texts, [G, T, E].
            lengths: Their numbers of tokens, [G].

        Returns:
            For each matrix, [G, 2 (I + O) + 1].
        """
        packed = pack_padded_sequence(
            embedded, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (last, _) = self.lstm(packed)
        read = torch.tanh(self.condition(torch.cat([last[0], last[1]], 1)))
        return [head(read) for head in self.heads]


class BoundedDivergence(Objective):
    """KE's: label-smoothed NLL under the constraint KL ≤ m; the loss is a · NLL + b α (KL − m).

    α and m are the network's ``multiplier`` and ``margin``.

    Args:
        edit: a.
        kept: b.
        smoothing: ε of the label smoothing.
    """

    def __init__(self, edit: float, kept: float, smoothing: float) -> None:
        self.edit = edit
        self.kept = kept
        self.smoothing = smoothing

    @override
    def token_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return smoothed_nll(logits, targets, self.smoothing)

    @override
    def weights(self, network: nn.Module) -> tuple[float, float]:
        return self.edit, self.kept * float(cast(KENetwork, network).multiplier.detach())

    @override
    def added(self, network: nn.Module, edit: Tensor, kept: Tensor) -> Tensor:
        own = cast(KENetwork, network)
        # α KL is in the loss already, as far as the edits go.
        weighted = self.kept * own.multiplier
        return weighted * (kept - own.margin) - weighted.detach() * kept


class MarginSchedule:
    """Has m shrink after each validation of a fit in which nearly all edits are said.

    Args:
        min_margin: Where it shrinks no further.
    """

    def __init__(self, min_margin: float) -> None:
        self.min_margin = min_margin
        #: Share of the edits of a validation that are said.
        self.flipped = MeanMetric()

    def update(self, found: Evaluation) -> None:
        """Takes note of whether an edit is said whole."""
        said = [probe.exact for probe in found.probes if probe.metric == "reliability"]
        self.flipped.update(torch.tensor(said, dtype=torch.float32))

    def step(self, editor: EditModule[E]) -> None:
        """Shrinks and logs the margin of an editor's network."""
        flipped = float(self.flipped.compute())
        self.flipped.reset()
        if editor.trainer.state.fn != "fit" or editor.trainer.sanity_checking:
            return
        margin = cast(KENetwork, editor.network).margin
        if flipped > WELL_FLIPPED:
            margin.copy_((TIGHTER * margin).clamp(min=self.min_margin))
        editor.log("margin", margin.clone(), sync_dist=True)  # equal already


class KE(HyperEditModule):
    """Reads an edit as text, and learns which parts of its gradient to take.

    The text is "old answer >> new answer || prompt"; the old answer is the request's, or what the
    model says. An LSTM reads it, and a head for each matrix makes of it the gate of
    ΔW = s σ(η) (∇W ∘ A + B), where A and B have rank one. The edit has the rank of its tokens and
    one.

    Trained on the label-smoothed NLL of prompt and rephrase under the constraint that the
    divergence on the locality probes stays below a margin: the loss is NLL + α (KL − m), which α
    climbs while the network descends. After each validation in which nine tenths of the edits are
    said, m shrinks by a fifth.

    It makes one edit at a time. It does not begin as the identity, and does not work untrained.

    Three things of the authors' are left out. Their learning rates fall to zero over 200,000 steps,
    which nobody takes on a small model: ``decay_steps`` has them fall over as many as a run has.
    Their other constraint, a bound on the norm of ΔW, is not offered: it says nothing of what the
    model answers, which is their own reason for the divergence. And ΔW is not added again until
    the answer flips, since an edit is computed once from the model as it stands; ``edit`` of the
    edited model makes a second step.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. All of them if None.
        hidden: Width of the LSTM and of the heads' inner layers.
        condition: Width of what stands for an edit.
        max_scale: s, the largest gate.
        lr: Learning rate of the network (centered RMSprop).
        multiplier_lr: Learning rate of α.
        margin: m at the beginning, in nats.
        min_margin: Where m shrinks no further.
        smoothing: ε of the label smoothing.
        warmup_steps: Steps in which learning rates rise from 0.
        decay_steps: Steps after which they have fallen to 0 again, linearly; they stay if None.
        train_embeddings: Train a copy of the token embeddings, as the authors do; those of the
            model are read if False, and are in no checkpoint.
        train_on: What the edited model has to answer: ``both`` prompt and rephrase, or one of them.
        edit_weight: Weight of the loss of the new answers.
        locality_weight: Weight of α (KL − m).
        kwargs: Further arguments of ``HyperEditModule``, such as ``modules``.

    References:
        Editing Factual Knowledge in Language Models, arXiv 2104.08164.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08164"
    default_modules: ClassVar[tuple[str, ...]] = (
        "attention_in",
        "attention_out",
        "mlp_in",
        "mlp_out",
    )
    locality_positions: ClassVar[Positions] = "answers"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        hidden: int = 128,
        condition: int = 1024,
        max_scale: float = 1.0,
        lr: float = 3e-4,
        multiplier_lr: float = 0.1,
        margin: float = 1e-3,
        min_margin: float = 1e-5,
        smoothing: float = 0.1,
        warmup_steps: int = 1000,
        decay_steps: int | None = None,
        train_embeddings: bool = False,
        train_on: TrainOn = "both",
        edit_weight: float = 1.0,
        locality_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, train_on=train_on, **kwargs)
        if self.edits_at_once != 1:
            raise ValueError(
                f"`edits_at_once` is expected to be 1, since KE makes one edit at a time, but got "
                f"{self.edits_at_once}. MEND and MALMEN edit with several."
            )
        if decay_steps is not None and decay_steps <= warmup_steps:
            raise ValueError(
                f"`decay_steps` is expected to be more than `warmup_steps={warmup_steps}`, but got "
                f"{decay_steps}."
            )
        self.hidden = hidden
        self.condition = condition
        self.max_scale = max_scale
        self.lr = lr
        self.multiplier_lr = multiplier_lr
        self.margin = margin
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.train_embeddings = train_embeddings
        self.objective = BoundedDivergence(edit_weight, locality_weight, smoothing)
        schedule = MarginSchedule(min_margin)
        self.network_training.schedule = schedule
        self.flipped = schedule.flipped  # moves to other devices with the editor
        self._said: dict[str, str] = {}

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return list(range(len(tree.blocks)))

    @override
    def build(
        self, tree: ModelTree, sites: Sequence[WeightSite], generator: torch.Generator
    ) -> nn.Module:
        table = cast(Any, tree.input_embeddings).weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return KENetwork(
                sites,
                table.shape[1],
                self.hidden,
                self.condition,
                self.margin,
                whole_tensor(table).float().clone() if self.train_embeddings else None,
            )

    @override
    def network_optimizer(self) -> OptimizerLRScheduler:
        network = self.network
        learned = [p for name, p in network.named_parameters() if name != "multiplier"]
        climbing: dict[str, object] = {
            "params": [network.multiplier],
            "lr": self.multiplier_lr,
            "maximize": True,
        }
        groups: list[dict[str, object]] = [{"params": learned}, climbing]
        optimizer = RMSprop(groups, lr=self.lr, centered=True)

        def keep_above_zero(*_: object) -> None:
            with torch.no_grad():
                network.multiplier.clamp_(min=0)

        optimizer.register_step_post_hook(keep_above_zero)
        if not self.warmup_steps and self.decay_steps is None:
            return optimizer
        schedule = LambdaLR(optimizer, self._rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _rate(self, step: int) -> float:
        """What learning rates are multiplied by."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.decay_steps is None:
            return 1.0
        return max(0.0, (self.decay_steps - step) / (self.decay_steps - self.warmup_steps))

    @override
    def transform(self, gradients: Gradients) -> dict[str, Factors]:
        requests, groups, count = gradients.requests, gradients.groups, gradients.count
        if count < len(requests):
            raise EditError(
                f"KE makes one edit at a time, but got {len(requests)} requests. Set "
                "`data.batch_size=1`, or edit them one after another."
            )
        ids = [self.tokens.tokenizer(text)["input_ids"] for text in self.conditions(requests)]
        tokens, mask = pad_rows([row[:LONGEST] for row in ids], self.tokens.pad_id)
        table: Any = self.network.embeddings or self.tree.input_embeddings
        with ends_whole(self.model):
            embedded = table(tokens.to(groups.device)).float()
        codes = self.network(embedded, mask.sum(1))
        found: dict[str, Factors] = {}
        for site, site_codes in zip(self.sites, codes, strict=True):
            own = gradients.rows[site.name]
            parts = []
            for i, code in enumerate(site_codes):
                mine = own.requests == i
                rows = own.inputs[mine], own.gradients[mine]
                parts.append(ke_factors(*rows, code, self.max_scale))
            sizes = torch.tensor([len(u) for u, _ in parts], device=groups.device)
            owners = torch.repeat_interleave(groups, sizes)
            u, v = (torch.cat(part) for part in zip(*parts, strict=True))
            found[site.name] = grouped(u, v, owners, count)
        return found

    def conditions(self, requests: Sequence[EditRequest]) -> list[str]:
        """The texts that stand for edits.

        Args:
            requests: Those without an old answer get what the model says.
        """
        unknown = [r for r in requests if r.target_old is None and r.id not in self._said]
        if unknown:
            evaluator = Evaluator(self.model, self.tokens, max_new_tokens=SAID)
            texts = evaluator.continuations([request.prompt for request in unknown])
            said = {r.id: text.strip() for r, text in zip(unknown, texts, strict=True)}
        else:
            said = {}
        known = {**self._said, **said}
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._said = known  # the model stays the same all along
        return [f"{r.target_old or known[r.id]} >> {r.target_new} || {r.prompt}" for r in requests]
