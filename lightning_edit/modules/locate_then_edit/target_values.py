# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Target values v*: what an MLP should return so that the model says the new answer.

Requests of near widths are optimized together, each with its own step count, clamp and early
stop, so that the figures are those of one request at a time. On an accelerator the host sends one
pass after another and looks at what came out every few passes.
"""

# Shapes: E requests, T context templates, N = E (T + 1) rows, C outputs that change, D hidden, M
# inputs of the edited projection, X target tokens of all rows, V vocabulary, S passes, L losses.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import ends_whole
from lightning_edit.modules.locate_then_edit.searches import (
    AdamSearch,
    GaussNewtonSearch,
    Losses,
    Search,
    SearchKind,
    StepSettings,
)
from lightning_edit.modules.locate_then_edit.target_rows import TargetRows, search_turns
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.norms import fused_norms
from lightning_edit.passes.tail import Place, Tail
from lightning_edit.passes.transfers import sent
from lightning_edit.passes.whole_rows import WholeRows, captured

__all__ = ["TargetValueSettings", "TargetValues", "optimize_target_values"]

# Passes between two looks of the host at which requests are finished, on an accelerator. A look
# takes a processor nothing, so that it looks after each.
TEST_EVERY = 4
# Once all target tokens are the likeliest, a search that settles counts their likelihood for this
# much less, and ends where the divergence is not above the other.
SETTLED_FACTOR, SETTLED_KL = 0.1, 1e-2
SEARCHES: dict[SearchKind, Callable[[Tensor, Tensor, StepSettings], Search]] = {
    "adam": AdamSearch,
    "gauss_newton": GaussNewtonSearch,
}
LOSSES = ("total", "nll", "kl", "wd")


@dataclass(frozen=True)
class TargetValueSettings:
    """How target values are optimized.

    Args:
        steps: Forward passes at most; the last one is followed by no update.
        lr: Learning rate of Adam.
        weight_decay: Factor of ‖δ‖ / ‖v‖².
        clamp_norm_factor: ‖δ‖ is kept below this factor times ‖v‖.
        kl_factor: Factor of the divergence on the anchor prompt.
        stop_loss: A request is finished once its loss is below.
        kl_prompt: Anchor prompt; ``{}`` stands for the subject.
        max_rows: Rows optimized at once; more requests are taken in turns.
        place: What changes: the output of the layer's ``mlp``, that of the whole ``block``, or
            those of its ``sublayers``, MLP and attention, each with a δ of its own.
        nll_factor: Factor of the targets' negative log-likelihood.
        settles: Once all target tokens are the likeliest, count their likelihood a tenth, and
            finish where the divergence is at most 0.01 (PMET, arXiv 2308.08742).
        search: ``adam``, as in the papers, or ``gauss_newton``, which needs fewer passes.
    """

    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    clamp_norm_factor: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 5e-2
    kl_prompt: str = "{} is a"
    max_rows: int = 512
    place: Place = "mlp"
    nll_factor: float = 1.0
    settles: bool = False
    search: SearchKind = "adam"


@dataclass
class TargetValues:
    """Target values of E requests and what was seen on the way to them.

    Args:
        keys: Input of the edited projection at the subject's last token, [E, T, M].
        outputs: What changes there, before the edit: the projection's output, or the residual
            stream after the block, [E, T, D].
        deltas: v* minus the output for the first template, [E, D].
        attention: The same of attention's output where it changes, too: the output for the first
            template and δ, [E, 2, D]; [E, 0, D] where it does not.
        losses: Of each request a list, one entry a forward pass, of ``total``, ``nll``, ``kl``
            and ``wd`` in nats, each with its factor.
        probabilities: Of each request the mean probability of its target's tokens (geometric) at
            the last pass, in [0, 1].
        failed: Request to the pass, counted from 1, at which its loss was no longer finite.
    """

    keys: Tensor
    outputs: Tensor
    deltas: Tensor
    attention: Tensor
    losses: list[list[dict[str, float]]] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    failed: dict[int, int] = field(default_factory=dict)

    @property
    def values(self) -> Tensor:
        """The target values v*, [E, D]."""
        return self.outputs[:, 0] + self.deltas

    def select(self, requests: Sequence[int]) -> Self:
        """The target values of some of the requests, in the order given."""
        rows = list(requests)
        return type(self)(
            self.keys[rows],
            self.outputs[rows],
            self.deltas[rows],
            self.attention[rows],
            [self.losses[e] for e in rows],
            [self.probabilities[e] for e in rows],
            {i: self.failed[e] for i, e in enumerate(rows) if e in self.failed},
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The target values of several batches, one after another."""
        starts = [sum(len(part.deltas) for part in parts[:i]) for i in range(len(parts))]
        return cls(
            torch.cat([part.keys for part in parts]),
            torch.cat([part.outputs for part in parts]),
            torch.cat([part.deltas for part in parts]),
            torch.cat([part.attention for part in parts]),
            [passes for part in parts for passes in part.losses],
            [p for part in parts for p in part.probabilities],
            {
                start + e: step
                for start, part in zip(starts, parts, strict=True)
                for e, step in part.failed.items()
            },
        )


@torch.inference_mode(False)
def optimize_target_values(
    tree: ModelTree,
    tokens: PromptTokenizer,
    layer: int,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    settings: TargetValueSettings,
    on_step: Callable[[int, float], None] | None = None,
    dtype: torch.dtype | None = None,
) -> TargetValues:
    """Finds the MLP outputs that make a model say the new answers.

    Minimizes for each request, over a change δ of the MLP's output at the subject's last token,

        nll_factor · mean over templates of −log P(target | template with prompt)
        + kl_factor · KL(p_δ ‖ p_0) at the subject of the anchor prompt
        + weight_decay · ‖δ‖ / ‖v‖²

    Args:
        tree: A decoder-only model.
        tokens: Its tokenizer.
        layer: Layer whose MLP output changes.
        requests: E edit requests.
        templates: T context templates, the first of them ``"{}"``; each ends in ``{}``.
        settings: How to optimize.
        on_step: Called with each pass and the mean probability of the targets: on a processor
            after the pass, on an accelerator every few passes.
        dtype: Precision of the passes' matrix products, if lower than the model's. Keys, values,
            the sums of losses and δ itself stay in float32.

    Returns:
        Target values in the order of the requests. A request whose loss stops being finite leaves
        the others alone and is named in ``failed``.

    Raises:
        RequestError: If a request in its context is longer than the model's.

    References:
        Locating and Editing Factual Associations in GPT, arXiv 2202.05262, section 3.1,
        equation 4.
    """
    device = next(tree.blocks[0].parameters()).device
    turns = search_turns(tokens, requests, len(templates), settings.max_rows, device)
    with ends_whole(tree.model):
        found = []
        for turn in turns:
            part = [requests[e] for e in turn]
            args = (tree, tokens, layer, part, templates, settings, on_step, dtype)
            found.append(_optimize(*args))
    order = [e for turn in turns for e in turn]
    return TargetValues.joined(found).select(sorted(range(len(order)), key=order.__getitem__))


@dataclass(frozen=True)
class _Passes:
    """The losses of a batch as functions of its requests' δ.

    Args:
        tail: Its rows, of which the part runs that δ changes.
        owner: Request of each row, [N].
        anchor: Anchor row of each request, [E].
        row: Row of each target token, [X].
        column: Column that predicts it, [X].
        token: Its id, [X].
        weight: What it counts for, [X].
        norm: ‖v‖ of each request, [E, C].
        factor: Factor of each request's likelihood, [E].
        reference: Log-probabilities at the anchors with δ = 0, [E, V], once they are known.
    """

    tail: Tail | WholeRows
    owner: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    token: Tensor
    weight: Tensor
    norm: Tensor
    factor: Tensor
    reference: Tensor | None = None

    def next_tokens(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of target tokens, [X, V], and log-probabilities at the anchors, [E, V]."""
        state = self.tail.hidden(change)
        # Logits only where a loss reads them.
        read = torch.cat([state[self.row, self.column], state[self.anchor, 0]])
        sizes = [len(self.row), len(self.anchor)]
        logits_X, logits_E = torch.split(self.tail.logits(read), sizes)
        return logits_X, log_softmax(logits_E, dim=-1)

    def losses(
        self, delta: Tensor, change: Tensor, settings: TargetValueSettings
    ) -> tuple[Losses, Self]:
        """Losses of a pass, and the same passes with the reference that the first one gives.

        Args:
            delta: δ of each request, [E, C, D].
            change: The same of each row, [N, C, D].
            settings: Factors of the losses.
        """
        logits_XV, logp_EV = self.next_tokens(change)
        nll_X = cross_entropy(logits_XV, self.token, reduction="none")
        owner_X, zeros_E = self.owner[self.row], torch.zeros_like(self.factor)
        plain_E = zeros_E.index_add(0, owner_X, nll_X * self.weight)
        reference_EV = logp_EV.detach() if self.reference is None else self.reference
        kl_E = settings.kl_factor * (logp_EV.exp() * (logp_EV - reference_EV)).sum(-1)
        size_EC = torch.linalg.vector_norm(delta, dim=-1)
        wd_E = settings.weight_decay * (size_EC / self.norm**2).sum(-1)
        nll_E = self.factor * plain_E
        right_E = zeros_E > 0
        if settings.settles:
            missed_X = (logits_XV.argmax(-1) != self.token).float()
            right_E = zeros_E.index_add(0, owner_X, missed_X) == 0
        # Rows are a request's templates and then its anchor, over and over.
        rows_N = torch.zeros(len(self.owner), device=delta.device)
        rows_N = rows_N.index_add(0, self.row, nll_X * self.weight)
        rows_ET = rows_N.reshape(len(self.anchor), -1)[:, :-1]
        rows_ET = rows_ET * rows_ET.shape[1]
        total_E = nll_E + kl_E + wd_E
        losses = Losses(total_E, nll_E, kl_E, wd_E, plain_E, right_E, rows_ET)
        return losses, replace(self, reference=reference_EV)

    def select(self, kept: Tensor) -> Self:
        """The passes of some of the requests, [e] int64 ascending."""
        is_kept = torch.zeros_like(self.factor, dtype=torch.bool)
        is_kept[kept] = True
        stays_N = is_kept[self.owner]
        new_row, new_owner = stays_N.cumsum(0) - 1, is_kept.cumsum(0) - 1
        stays_X = stays_N[self.row]
        return replace(
            self,
            tail=self.tail.select(stays_N.nonzero()[:, 0]),
            owner=new_owner[self.owner[stays_N]],
            anchor=new_row[self.anchor[kept]],
            row=new_row[self.row[stays_X]],
            column=self.column[stays_X],
            token=self.token[stays_X],
            weight=self.weight[stays_X],
            norm=self.norm[kept],
            factor=self.factor[kept],
            reference=None if self.reference is None else self.reference[kept],
        )


def _passes_between_tests(device: torch.device) -> int:
    return 1 if device.type == "cpu" else TEST_EVERY


def _goes_on(losses: Losses, settings: TargetValueSettings) -> Tensor:
    """Whether each request is to be searched further, [E] bool."""
    total_E = losses.total.detach()
    going_E = (total_E >= settings.stop_loss) & total_E.isfinite()
    if settings.settles:
        going_E &= ~(losses.right & (losses.kl.detach() <= SETTLED_KL))
    return going_E


def _optimize(
    tree: ModelTree,
    tokens: PromptTokenizer,
    layer: int,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    settings: TargetValueSettings,
    on_step: Callable[[int, float], None] | None,
    dtype: torch.dtype | None,
) -> TargetValues:
    rows = TargetRows.of(tokens, requests, templates, settings.kl_prompt)
    tail = captured(tree, layer, rows.ids, rows.splits, tokens.pad_id, settings.place)
    if dtype is not None:
        tail = tail.lower(dtype)
    device = tail.keys.device
    count, width = len(requests), len(templates)

    def index(values: Sequence[int] | Sequence[float]) -> Tensor:
        return sent(torch.tensor(values), device)

    is_anchor = torch.zeros(len(rows.ids), dtype=torch.bool)
    is_anchor[rows.anchor] = True
    template_N = sent((~is_anchor).nonzero()[:, 0], device)
    keys = tail.keys[template_N].reshape(count, width, -1).float()
    values = tail.values[template_N]
    values_ETCD = values.reshape(count, width, *values.shape[1:]).float()
    first_ECD = values_ETCD[:, 0]
    norm_EC = torch.linalg.vector_norm(first_ECD, dim=-1)
    passes = _Passes(
        tail,
        index(rows.owner),
        index(rows.anchor),
        index(rows.row),
        index(rows.column),
        index(rows.token),
        index(rows.weight),
        norm_EC,
        torch.full((count,), settings.nll_factor, device=device),
    )
    delta_ECD = torch.zeros_like(first_ECD)
    steps = StepSettings(settings.lr, settings.clamp_norm_factor, settings.weight_decay)
    search = SEARCHES[settings.search](torch.zeros_like(first_ECD), norm_EC, steps)
    # All figures stay on the device until the end.
    table_SEL = torch.zeros(settings.steps, count, len(LOSSES), device=device)
    likely_SE = torch.zeros(settings.steps, count, device=device)
    passes_E = torch.zeros(count, dtype=torch.long, device=device)
    every = _passes_between_tests(device)
    live_E = torch.arange(count, device=device)  # requests in the batch
    active_E = torch.ones(count, dtype=torch.bool, device=device)  # those of them not finished
    told = 0

    with torch.enable_grad(), borrowed(tree.model), fused_norms(tree.model):
        for step in range(settings.steps):
            delta = search.trial.clone().requires_grad_()
            change = delta[passes.owner]
            losses, passes = passes.losses(delta, change, settings)
            seen = search.look(losses, passes.factor, active_E)
            delta_ECD[live_E] = search.found
            table_SEL[step, live_E] = seen.table()
            likely_SE[step] = likely_SE[step - 1]
            likely = seen.likely.detach()
            likely_SE[step, live_E] = torch.where(active_E, likely, likely_SE[step, live_E])
            passes_E[live_E] += active_E
            is_last = step == settings.steps - 1
            is_tested = is_last or (step + 1) % every == 0
            if is_tested and on_step is not None:
                means = likely_SE[told : step + 1].mean(1).tolist()
                for earlier, mean in enumerate(means, told):
                    on_step(earlier, mean)
                told = step + 1
            if is_last:
                break
            going_E = active_E & _goes_on(seen, settings)
            # The host waits for the device here and nowhere else in the loop.
            kept_E = going_E.nonzero()[:, 0] if is_tested else None
            if kept_E is not None and not len(kept_E):
                break
            if settings.settles:
                factor_E = torch.where(seen.right, SETTLED_FACTOR, 1.0) * settings.nll_factor
                passes = replace(passes, factor=factor_E)
            # What is finished is frozen: it gets no gradient and no step.
            search.step(losses, delta, change, going_E)
            active_E = going_E
            if kept_E is not None and len(kept_E) < len(live_E):
                # Finished requests leave the batch.
                search.select(kept_E)
                passes, live_E = passes.select(kept_E), live_E[kept_E]
                active_E = going_E[kept_E]
    made, table = passes_E.tolist(), table_SEL.transpose(0, 1).tolist()
    losses_of = [
        [dict(zip(LOSSES, figures, strict=True)) for figures in own[:n]]
        for own, n in zip(table, made, strict=True)
    ]
    probabilities = likely_SE[max(made) - 1].tolist()
    failed = {e: n for e, n in enumerate(made) if not math.isfinite(losses_of[e][-1]["total"])}
    attention = torch.stack([first_ECD[:, 1:], delta_ECD[:, 1:]], 2).flatten(1, 2)
    return TargetValues(
        keys, values_ETCD[:, :, 0], delta_ECD[:, 0], attention, losses_of, probabilities, failed
    )
