# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Target values v*: what an MLP should return so that the model says the new answer.

All requests of a batch are optimized together, each with its own step count, clamp and
early stop, so that the figures are those of one request at a time.
"""

# Shapes: E requests, T context templates, N = E (T + 1) rows, C outputs that change, D hidden, M
# inputs of the edited projection, X target tokens of all rows, V vocabulary.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import ends_whole
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.tail import Place
from lightning_edit.passes.whole_rows import captured

__all__ = ["TargetValueSettings", "TargetValues", "optimize_target_values"]

# Adam's defaults, which the papers keep.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
# Once all target tokens are the likeliest, a search that settles counts their likelihood for this
# much less, and ends where the divergence is not above the other.
SETTLED_FACTOR, SETTLED_KL = 0.1, 1e-2
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
        on_step: Called after each pass with the pass and the mean probability of the targets.
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
    turns = _turns(tokens, requests, settings.max_rows // (len(templates) + 1))
    with ends_whole(tree.model):
        found = []
        for turn in turns:
            part = [requests[e] for e in turn]
            args = (tree, tokens, layer, part, templates, settings, on_step, dtype)
            found.append(_optimize(*args))
    order = [e for turn in turns for e in turn]
    return TargetValues.joined(found).select(sorted(range(len(order)), key=order.__getitem__))


def _turns(
    tokens: PromptTokenizer, requests: Sequence[EditRequest], per_turn: int
) -> list[list[int]]:
    """Requests to take together: those with equally many tokens from the subject on."""
    by_width: dict[int, list[int]] = {}
    for e, request in enumerate(requests):
        prompt, last = tokens.subject_of(request)
        target = tokens.target(request.prompt, request.target_new, request.glued)
        by_width.setdefault(len(prompt) - last + len(target), []).append(e)
    size = max(1, per_turn)
    return [
        group[i : i + size]
        for _, group in sorted(by_width.items())
        for i in range(0, len(group), size)
    ]


@dataclass
class _Rows:
    """Token rows of a batch, and where its losses are read."""

    ids: list[list[int]] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)  # request of each row
    # One entry a target token: its row, the column that predicts it, the token and its weight.
    row: list[int] = field(default_factory=list)
    column: list[int] = field(default_factory=list)
    token: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    anchor: list[int] = field(default_factory=list)  # anchor row of each request


def _make_rows(
    tokens: PromptTokenizer,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    kl_prompt: str,
) -> _Rows:
    rows = _Rows()
    for e, request in enumerate(requests):
        target = tokens.target(request.prompt, request.target_new, request.glued)
        for template in templates:
            prefix = template.removesuffix("{}")
            prompt, last = tokens.subject_of(request, prefix)
            tokens.check_length(request, len(prompt), len(target), prefix)
            for j, token in enumerate(target):
                rows.row.append(len(rows.ids))
                rows.column.append(len(prompt) - 1 + j - last)
                rows.token.append(token)
                rows.weight.append(1 / (len(target) * len(templates)))
            rows.ids.append(prompt + target[:-1])
            rows.splits.append(last)
            rows.owner.append(e)
        anchor, last = tokens.subject_last(
            kl_prompt.replace("{}", request.subject, 1),
            request.subject,
            start=kl_prompt.index("{}"),
        )
        rows.anchor.append(len(rows.ids))
        # The words after the subject cannot matter at the subject, where the KL is read.
        rows.ids.append(anchor[: last + 1])
        rows.splits.append(last)
        rows.owner.append(e)
    return rows


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
    rows = _make_rows(tokens, requests, templates, settings.kl_prompt)
    tail = captured(tree, layer, rows.ids, rows.splits, tokens.pad_id, settings.place)
    if dtype is not None:
        tail = tail.lower(dtype)
    device = tail.keys.device
    count, width = len(requests), len(templates)

    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device)

    anchor_E, owner_N = index(rows.anchor), index(rows.owner)
    row_X, column_X, token_X = index(rows.row), index(rows.column), index(rows.token)
    weight_X = torch.tensor(rows.weight, device=device)
    template_N = torch.ones(len(rows.ids), dtype=torch.bool, device=device)
    template_N[anchor_E] = False
    keys = tail.keys[template_N].reshape(count, width, -1).float()
    values = tail.values[template_N]
    values_ETCD = values.reshape(count, width, *values.shape[1:]).float()
    first_ECD = values_ETCD[:, 0]

    init_norm_EC = torch.linalg.vector_norm(first_ECD, dim=-1)
    delta_ECD = torch.zeros_like(first_ECD)
    moment1, moment2 = torch.zeros_like(delta_ECD), torch.zeros_like(delta_ECD)
    losses: list[list[dict[str, float]]] = [[] for _ in requests]
    probabilities = [0.0] * count
    failed: dict[int, int] = {}
    reference_EV: Tensor | None = None
    live_E = torch.arange(count, device=device)  # requests that are not finished
    factor_E = torch.full((count,), settings.nll_factor, device=device)

    with torch.enable_grad(), borrowed(tree.model):
        for step in range(settings.steps):
            delta = delta_ECD[live_E].requires_grad_()
            local_N = torch.searchsorted(live_E, owner_N)
            state = tail.hidden(delta[local_N])
            # Logits only where a loss reads them.
            read = torch.cat([state[row_X, column_X], state[anchor_E, 0]])
            logp = log_softmax(tail.logits(read), dim=-1)
            n_targets = token_X.shape[0]
            logp_XV, logp_EV = logp[:n_targets], logp[n_targets:]
            logp_X = logp_XV.gather(1, token_X[:, None])[:, 0]
            zeros_E = torch.zeros(len(live_E), device=device)
            plain_nll_E = zeros_E.index_add(0, local_N[row_X], -logp_X * weight_X)
            nll_E = factor_E * plain_nll_E
            if reference_EV is None:
                reference_EV = logp_EV.detach()
            kl_E = settings.kl_factor * (logp_EV.exp() * (logp_EV - reference_EV)).sum(-1)
            size_EC = torch.linalg.vector_norm(delta, dim=-1)
            wd_E = settings.weight_decay * (size_EC / init_norm_EC[live_E] ** 2).sum(-1)
            total_E = nll_E + kl_E + wd_E

            table = torch.stack([total_E, nll_E, kl_E, wd_E], 1).detach().cpu().tolist()
            likely = torch.exp(-plain_nll_E.detach()).tolist()
            for e, figures, probability in zip(live_E.tolist(), table, likely, strict=True):
                losses[e].append(dict(zip(LOSSES, figures, strict=True)))
                probabilities[e] = probability
                if not math.isfinite(figures[0]):
                    failed[e] = step + 1
            if on_step is not None:
                on_step(step, sum(probabilities) / count)
            if step == settings.steps - 1:
                break
            going = (total_E.detach() >= settings.stop_loss) & total_E.detach().isfinite()
            if settings.settles:
                missed_X = (logp_XV.argmax(-1) != token_X).float()
                right_E = zeros_E.index_add(0, local_N[row_X], missed_X) == 0
                factor_E = torch.where(right_E, SETTLED_FACTOR, 1.0) * settings.nll_factor
                going &= ~(right_E & (kl_E.detach() <= SETTLED_KL))
            if not bool(going.any()):
                break
            (gradient,) = torch.autograd.grad(total_E[going].sum(), delta)
            with torch.no_grad():
                live = live_E[going]
                gradient = gradient[going]
                moment1[live] = BETA1 * moment1[live] + (1 - BETA1) * gradient
                moment2[live] = BETA2 * moment2[live] + (1 - BETA2) * gradient**2
                # Every request that is still live has made the same number of steps.
                step_size = settings.lr / (1 - BETA1 ** (step + 1))
                scale = (moment2[live] / (1 - BETA2 ** (step + 1))).sqrt() + EPSILON
                moved = delta_ECD[live] - step_size * moment1[live] / scale
                limit = settings.clamp_norm_factor * init_norm_EC[live, :, None]
                norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
                delta_ECD[live] = torch.where(norm > limit, moved * limit / norm, moved)
                if len(live) < len(live_E):  # finished requests leave the batch
                    stays_N = going[local_N]
                    new_row = stays_N.cumsum(0) - 1
                    tail = tail.select(stays_N.nonzero()[:, 0])
                    owner_N = owner_N[stays_N]
                    anchor_E = new_row[anchor_E[going]]
                    reference_EV, factor_E = reference_EV[going], factor_E[going]
                    stays_X = stays_N[row_X]
                    row_X, column_X = new_row[row_X[stays_X]], column_X[stays_X]
                    token_X, weight_X = token_X[stays_X], weight_X[stays_X]
                    live_E = live
    attention = torch.stack([first_ECD[:, 1:], delta_ECD[:, 1:]], 2).flatten(1, 2)
    return TargetValues(
        keys, values_ETCD[:, :, 0], delta_ECD[:, 0], attention, losses, probabilities, failed
    )
