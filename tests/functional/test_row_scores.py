# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""functional/metrics.py and functional/counterfact.py against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_edit.functional import (
    edit_score,
    efficacy_magnitude,
    efficacy_success,
    kl_divergence,
    locality_agreement,
    mirage_gap,
    neighborhood_magnitude,
    neighborhood_success,
    token_accuracy,
)


def slow_accuracy(preds: list[int], target: list[int], ignore: int, strict: bool) -> float:
    pairs = [(p, t) for p, t in zip(preds, target, strict=True) if t != ignore]
    right = [p == t for p, t in pairs]
    return float(all(right)) if strict else sum(right) / len(right)


@pytest.mark.parametrize("strict", [False, True])
def test_token_accuracy_equals_a_loop(strict: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    preds = torch.randint(3, (40, 6), generator=generator)
    target = torch.randint(-1, 3, (40, 6), generator=generator)
    target[target < 0] = -100
    target[:, 5] = 1
    scores = token_accuracy(preds, target, strict=strict)
    rows = zip(preds.tolist(), target.tolist(), strict=True)
    expected = [slow_accuracy(p, t, -100, strict) for p, t in rows]
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_token_accuracy_reads_logits_and_another_ignore_index() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 3] = logits[0, 1, 2] = logits[0, 2, 1] = 1.0
    target = torch.tensor([[3, 0, 9]])
    assert token_accuracy(logits, target, ignore_index=9).tolist() == [0.5]
    assert token_accuracy(logits.bfloat16(), target, ignore_index=9).tolist() == [0.5]


def test_rows_without_target_are_named() -> None:
    ids = torch.tensor([[1, 2], [-100, -100], [3, 4], [-100, -100]])
    with pytest.raises(ValueError, match=r"Rows \[1, 3\]"):
        token_accuracy(ids, ids)


def test_wrong_inputs_of_token_accuracy() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"`preds`.*float32"):
        token_accuracy(ids.float(), ids)
    with pytest.raises(TypeError, match=r"`target`.*bool"):
        token_accuracy(ids, ids.bool())
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        token_accuracy(ids, ids[:, :2])
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        token_accuracy(ids[0], ids[0])


def test_locality_counts_only_the_mask() -> None:
    preds = torch.tensor([[1, 2, 3], [4, 5, 6]])
    reference = torch.tensor([[0, 2, 3], [4, 0, 0]])
    mask = torch.tensor([[False, True, True], [True, True, True]])
    assert locality_agreement(preds, reference, mask).tolist() == pytest.approx([1, 1 / 3])
    assert locality_agreement(preds, reference, mask, strict=True).tolist() == [1, 0]
    with pytest.raises(TypeError, match="boolean"):
        locality_agreement(preds, reference, mask.long())
    with pytest.raises(ValueError, match="`mask`"):
        locality_agreement(preds, reference, mask[:, :2])
    with pytest.raises(ValueError, match=r"Rows \[0, 1\]"):
        locality_agreement(preds, reference, torch.zeros_like(mask))


def test_kl_divergence_equals_its_sum_and_has_a_direction() -> None:
    p, q = [0.7, 0.2, 0.1], [0.1, 0.6, 0.3]
    forward = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    backward = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    rows = (torch.tensor([p, q]).double(), torch.tensor([q, p]).double())
    result = kl_divergence(rows[0].log(), rows[1].log())
    assert result.dtype == torch.float64
    # The float32 literals carry 1e-8.
    assert result.tolist() == pytest.approx([forward, backward], rel=1e-6)
    assert abs(forward - backward) > 0.1


def test_kl_divergence_of_logits_zeros_and_half_precision() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    # A constant added to logits changes no distribution.
    assert kl_divergence(logits, logits + 5.0).item() == pytest.approx(0, abs=1e-6)
    assert kl_divergence(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32
    certain = torch.tensor([[1.0, 0.0]]).log()
    even = torch.tensor([[0.5, 0.5]]).log()
    assert kl_divergence(certain, even).item() == pytest.approx(math.log(2))
    assert kl_divergence(even, certain).item() == math.inf
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 3\)"):
        kl_divergence(even, logits)


def test_kl_divergence_is_never_negative() -> None:
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    noise = 1e-6 * torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    assert (kl_divergence(logits, logits + noise) >= 0).all()


def test_counterfact_successes_fail_on_ties() -> None:
    new, old = torch.tensor([1.0, 2.0, 1.5]), torch.tensor([2.0, 1.0, 1.5])
    assert efficacy_success(new, old).tolist() == [1, 0, 0]
    assert neighborhood_success(new, old).tolist() == [0, 1, 0]
    expected = [math.exp(-1) - math.exp(-2), math.exp(-2) - math.exp(-1), 0]
    assert efficacy_magnitude(new, old).tolist() == pytest.approx(expected)
    assert neighborhood_magnitude(new, old).tolist() == pytest.approx([-x for x in expected])
    for function in (efficacy_success, neighborhood_success, efficacy_magnitude):
        with pytest.raises(ValueError, match="nan"):
            function(new, torch.tensor([1.0, math.nan, 1.0]))
        with pytest.raises(ValueError, match="same shape"):
            function(new, old[:2])


def test_edit_score_is_the_harmonic_mean() -> None:
    assert edit_score(1, 1, 1) == 1
    assert edit_score(0.9, 0.6, 0.3) == pytest.approx(3 / (1 / 0.9 + 1 / 0.6 + 1 / 0.3))
    assert edit_score(1, 0, 1) == 0
    assert math.isnan(edit_score(1, 0, math.nan))


def test_mirage_gap_is_positive_where_teacher_forcing_flatters() -> None:
    assert mirage_gap(1.0, 0.25) == 0.75
    assert mirage_gap(0.25, 1.0) == -0.75
