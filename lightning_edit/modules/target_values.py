# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Target values v*: what an MLP should return so that the model says the new answer.

All requests of a batch are optimized together, each with its own step count, clamp and
early stop, so that the figures are those of one request at a time.
"""

# Shapes: E requests, T context templates, N = E (T + 1) rows, D hidden, M inputs of the edited
# projection, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.request import EditRequest
from lightning_edit.modules.tail import Place, Tail, frozen

__all__ = ["TargetValueSettings", "TargetValues", "optimize_target_values"]

# Adam's defaults, which the papers keep.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


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
        place: What changes: the output of the layer's ``mlp``, or that of the whole ``block``.
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


@dataclass
class TargetValues:
    """Target values of E requests and what was seen on the way to them.

    Args:
        keys: Input of the edited projection at the subject's last token, [E, T, M].
        outputs: What changes there, before the edit: the projection's output, or the residual
            stream behind the block, [E, T, D].
        deltas: v* minus the output for the first template, [E, D].
        losses: Of each request a list, one entry a forward pass, of ``total``, ``nll``, ``kl``
            and ``wd`` in nats (``kl`` and ``wd`` with their factors).
        probabilities: Of each request exp(−nll) at the last pass, in [0, 1].
    """

    keys: Tensor
    outputs: Tensor
    deltas: Tensor
    losses: list[list[dict[str, float]]] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)

    @property
    def values(self) -> Tensor:
        """The target values v*, [E, D]."""
        return self.outputs[:, 0] + self.deltas


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

        mean over templates of −log P(target | template with prompt)
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
        Target values in the order of the requests.

    Raises:
        EditError: If a loss stops being finite; the message names the request.

    References:
        Locating and Editing Factual Associations in GPT, arXiv 2202.05262, section 3.1,
        equation 4.
    """
    turns = _turns(tokens, requests, settings.max_rows // (len(templates) + 1))
    found = [
        _optimize(
            tree, tokens, layer, [requests[e] for e in turn], templates, settings, on_step, dtype
        )
        for turn in turns
    ]
    order = [e for turn in turns for e in turn]
    place = sorted(range(len(order)), key=order.__getitem__)
    losses = [entry for part in found for entry in part.losses]
    probabilities = [p for part in found for p in part.probabilities]
    return TargetValues(
        keys=torch.cat([part.keys for part in found])[place],
        outputs=torch.cat([part.outputs for part in found])[place],
        deltas=torch.cat([part.deltas for part in found])[place],
        losses=[losses[i] for i in place],
        probabilities=[probabilities[i] for i in place],
    )


def _turns(
    tokens: PromptTokenizer, requests: Sequence[EditRequest], per_turn: int
) -> list[list[int]]:
    """Requests to take together: those with equally many tokens from the subject on."""
    by_width: dict[int, list[int]] = {}
    for e, request in enumerate(requests):
        prompt, last = tokens.subject_last(request.prompt, request.subject)
        target = tokens.target(request.prompt, request.target_new)
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
        target = tokens.target(request.prompt, request.target_new)
        for template in templates:
            prefix = template.removesuffix("{}")
            prompt, last = tokens.subject_last(request.prompt, request.subject, prefix)
            for j, token in enumerate(target):
                rows.row.append(len(rows.ids))
                rows.column.append(len(prompt) - 1 + j - last)
                rows.token.append(token)
                rows.weight.append(1 / (len(target) * len(templates)))
            rows.ids.append(prompt + target[:-1])
            rows.splits.append(last)
            rows.owner.append(e)
        anchor, last = tokens.subject_last(
            kl_prompt.replace("{}", request.subject, 1), request.subject
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
    tail = Tail.capture(tree, layer, rows.ids, rows.splits, tokens.pad_id, settings.place)
    if dtype is not None:
        tail = tail.lower(dtype)
    device = tail.state.device
    count, width = len(requests), len(templates)

    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device)

    anchor_E, owner_N = index(rows.anchor), index(rows.owner)
    row_X, column_X, token_X = index(rows.row), index(rows.column), index(rows.token)
    weight_X = torch.tensor(rows.weight, device=device)
    template_N = torch.ones(len(rows.ids), dtype=torch.bool, device=device)
    template_N[anchor_E] = False
    keys = tail.keys[template_N].reshape(count, width, -1).float()
    outputs = tail.values[template_N].reshape(count, width, -1).float()

    init_norm_E = torch.linalg.vector_norm(outputs[:, 0], dim=-1)
    delta_ED = torch.zeros_like(outputs[:, 0])
    moment1, moment2 = torch.zeros_like(delta_ED), torch.zeros_like(delta_ED)
    losses: list[list[dict[str, float]]] = [[] for _ in requests]
    probabilities = [0.0] * count
    reference_EV: Tensor | None = None
    live_E = torch.arange(count, device=device)  # requests that are not finished

    with torch.enable_grad(), frozen(tree.model):
        for step in range(settings.steps):
            delta = delta_ED[live_E].requires_grad_()
            local_N = torch.searchsorted(live_E, owner_N)
            state = tail.hidden(delta[local_N])
            # Logits only where a loss reads them.
            read = torch.cat([state[row_X, column_X], state[anchor_E, 0]])
            logp = log_softmax(tail.logits(read), dim=-1)
            n_targets = token_X.shape[0]
            logp_X = logp[:n_targets].gather(1, token_X[:, None])[:, 0]
            nll_E = torch.zeros(len(live_E), device=device).index_add(
                0, local_N[row_X], -logp_X * weight_X
            )
            logp_EV = logp[n_targets:]
            if reference_EV is None:
                reference_EV = logp_EV.detach()
            kl_E = settings.kl_factor * (logp_EV.exp() * (logp_EV - reference_EV)).sum(-1)
            norm_E = init_norm_E[live_E]
            wd_E = settings.weight_decay * torch.linalg.vector_norm(delta, dim=-1) / norm_E**2
            total_E = nll_E + kl_E + wd_E

            table = torch.stack([total_E, nll_E, kl_E, wd_E], 1).detach().cpu().tolist()
            for e, figures in zip(live_E.tolist(), table, strict=True):
                losses[e].append(dict(zip(("total", "nll", "kl", "wd"), figures, strict=True)))
                probabilities[e] = float(torch.tensor(-figures[1]).exp())
                if figures[0] != figures[0]:  # NaN
                    raise EditError(
                        f"Request {requests[e].id!r}: the loss of its target value is not a number "
                        f"at pass {step + 1}. Lower `lr`, or edit this request alone in float32."
                    )
            if on_step is not None:
                on_step(step, sum(probabilities) / count)
            if step == settings.steps - 1:
                break
            going = total_E.detach() >= settings.stop_loss
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
                moved = delta_ED[live] - step_size * moment1[live] / scale
                limit = settings.clamp_norm_factor * init_norm_E[live, None]
                norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
                delta_ED[live] = torch.where(norm > limit, moved * limit / norm, moved)
                if len(live) < len(live_E):  # finished requests leave the batch
                    stays_N = going[local_N]
                    new_row = stays_N.cumsum(0) - 1
                    tail = tail.select(stays_N.nonzero()[:, 0])
                    owner_N = owner_N[stays_N]
                    anchor_E = new_row[anchor_E[going]]
                    reference_EV = reference_EV[going]
                    stays_X = stays_N[row_X]
                    row_X, column_X = new_row[row_X[stays_X]], column_X[stays_X]
                    token_X, weight_X = token_X[stays_X], weight_X[stays_X]
                    live_E = live
    return TargetValues(keys, outputs, delta_ED, losses, probabilities)
