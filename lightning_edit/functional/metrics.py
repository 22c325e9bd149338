# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Scores of single rows: token accuracy and divergence from the unedited model.

Shapes: B rows, T tokens, V vocabulary. A row is one probe of one request. Every score is returned
per row and left unreduced, for rates are to be weighted by rows and never by batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "kl_divergence",
    "locality_agreement",
    "mirage_gap",
    "token_accuracy",
]


def token_accuracy(
    preds: Tensor, target: Tensor, ignore_index: int = -100, strict: bool = False
) -> Tensor:
    """Fraction of target tokens that the model predicts when the right prefix is fed to it.

    The teacher-forced reading of reliability, generality and portability. It overstates what the
    model says by itself: every token is judged after the *right* preceding ones (see
    [`mirage_gap`][lightning_edit.functional.mirage_gap]).

    Args:
        preds: Predicted token ids, shape [B, T], or logits, shape [B, T, V]. Position t holds the
            prediction *of* ``target[:, t]``: logits are to be shifted by the caller.
        target: Target token ids, shape [B, T], with ``ignore_index`` at all other positions.
        ignore_index: Marks the positions that do not count.
        strict: Count a row only if all of its tokens are right: 1 or 0.

    Returns:
        Float32 tensor of shape [B], each in [0, 1].

    Raises:
        TypeError: If ids are not integers.
        ValueError: If the shapes disagree, or a row has no target token.

    Examples:
        >>> target = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
        >>> token_accuracy(torch.tensor([[0, 5, 9], [0, 0, 7]]), target)
        tensor([0.5000, 1.0000])
        >>> token_accuracy(torch.tensor([[0, 5, 9], [0, 0, 7]]), target, strict=True)
        tensor([0., 1.])

    References:
        arXiv 2305.13172, section 2 (reliability, generality).
    """
    if preds.ndim == 3 and target.ndim == 2 and preds.is_floating_point():
        preds = preds.argmax(dim=-1)
    _check_ids("preds", preds, "target", target)
    return _row_means(preds == target, target != ignore_index, strict)


def locality_agreement(
    preds: Tensor, reference: Tensor, mask: Tensor, strict: bool = False
) -> Tensor:
    """Fraction of positions at which the edited model predicts what the unedited one did.

    It asks whether the prediction *changed*, not whether it is right.

    Args:
        preds: Token ids predicted by the edited model, shape [B, T].
        reference: Token ids predicted by the unedited model at the same positions, shape [B, T],
            taken before the first edit.
        mask: True at the positions that count, boolean, shape [B, T].
        strict: Count a row only if all of its positions agree: 1 or 0.

    Returns:
        Float32 tensor of shape [B], each in [0, 1].

    Raises:
        TypeError: If ids are not integers, or the mask is not boolean.
        ValueError: If the shapes disagree, or a row has no position that counts.

    Examples:
        >>> preds, reference = torch.tensor([[3, 4, 5]]), torch.tensor([[3, 9, 5]])
        >>> locality_agreement(preds, reference, torch.tensor([[False, True, True]]))
        tensor([0.5000])

    References:
        arXiv 2305.13172, section 2 (locality).
    """
    _check_ids("preds", preds, "reference", reference)
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` is expected to be boolean, but got {mask.dtype}.")
    if mask.shape != preds.shape:
        raise ValueError(
            f"`mask` is expected to have the shape of `preds`, {tuple(preds.shape)}, "
            f"but got {tuple(mask.shape)}."
        )
    return _row_means(preds == reference, mask, strict)


def kl_divergence(log_p_reference: Tensor, log_q: Tensor) -> Tensor:
    r"""Divergence of the edited model's distribution from the unedited one's, in nats.

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_v p_v (\log p_v - \log q_v)

    with p of the unedited and q of the edited model. Both are normalized in float32 (float64 stays
    float64), so logits serve as well as log-probabilities.

    Args:
        log_p_reference: Log-probabilities or logits of the unedited model, shape [B, V].
        log_q: Those of the edited model, same shape.

    Returns:
        Tensor of shape [B], at least 0; infinite where q forbids what p allows.

    Raises:
        ValueError: If the shapes disagree.

    Examples:
        >>> p = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
        >>> q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> kl_divergence(p, q)
        tensor([0.0000, 0.1438])
    """
    if log_p_reference.shape != log_q.shape:
        raise ValueError(
            "`log_p_reference` and `log_q` are expected to have the same shape, but got "
            f"{tuple(log_p_reference.shape)} and {tuple(log_q.shape)}."
        )
    dtype = torch.promote_types(
        torch.promote_types(log_p_reference.dtype, log_q.dtype), torch.float32
    )
    log_p = log_p_reference.to(dtype).log_softmax(dim=-1)
    log_q = log_q.to(dtype).log_softmax(dim=-1)
    p = log_p.exp()
    # Tokens that p forbids add nothing; -inf - -inf would make them nan.
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    # Rounding alone can push a divergence of nearly equal distributions below zero.
    return terms.sum(dim=-1).clamp_min(0)


def mirage_gap(teacher_forced: float, autoregressive: float) -> float:
    """By how much teacher forcing flatters the edit: its rate less that of free generation.

    Args:
        teacher_forced: Reliability in the teacher-forced reading, in [0, 1].
        autoregressive: Reliability in the autoregressive reading, in [0, 1].

    Returns:
        The difference, in [-1, 1].

    Examples:
        >>> round(mirage_gap(0.96, 0.38), 2)
        0.58

    References:
        arXiv 2502.11177.
    """
    return teacher_forced - autoregressive


def _row_means(hits: Tensor, mask: Tensor, strict: bool) -> Tensor:
    counts = mask.sum(dim=-1)
    if (counts == 0).any():
        rows = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"Rows {rows} have no position that counts, so their accuracy is undefined. "
            "Leave such rows out, or check how the target was masked or truncated."
        )
    right = (hits & mask).sum(dim=-1)
    return (right == counts).float() if strict else right / counts


def _check_ids(name: str, ids: Tensor, other_name: str, other: Tensor) -> None:
    for label, tensor in ((name, ids), (other_name, other)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"`{label}` is expected to be token ids, but got {tensor.dtype}.")
    if ids.ndim != 2 or ids.shape != other.shape:
        raise ValueError(
            f"`{name}` and `{other_name}` are expected to be of one shape [B, T], but got "
            f"{tuple(ids.shape)} and {tuple(other.shape)}."
        )
