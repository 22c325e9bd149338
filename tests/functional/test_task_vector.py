# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from lightning_edit.functional.task_vector import (
    forget,
    forget_learned,
    forgetting_importance,
    old_answer_residual,
    surviving_share,
    task_vector,
)


def _pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5, 7, generator=generator)
    tuned = theta + 0.01 * torch.randn(5, 7, generator=generator)
    return theta.to(dtype), tuned.to(dtype)


def test_rate_zero_changes_no_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        theta, tuned = _pair(dtype)
        assert torch.equal(forget(theta, task_vector(theta, tuned), 0.0), theta)


def test_rate_minus_one_gives_the_tuned_weights() -> None:
    theta, tuned = _pair()
    tau = task_vector(theta, tuned)
    torch.testing.assert_close(forget(theta, tau, -1.0), tuned, rtol=0, atol=1e-6)


def test_there_and_back_restores() -> None:
    theta, tuned = _pair()
    tau = task_vector(theta, tuned)
    back = forget(forget(theta, tau, 0.7), tau, -0.7)
    torch.testing.assert_close(back, theta, rtol=0, atol=1e-6)
    assert not torch.equal(forget(theta, tau, 0.7), theta)


def test_learned_form_is_the_linear_one() -> None:
    theta, tuned = _pair()
    expected = (1 + 0.3) * theta.double() - 0.3 * tuned.double()
    torch.testing.assert_close(
        forget_learned(theta, tuned, 0.3).double(), expected, rtol=0, atol=1e-6
    )


def test_low_precision_is_rounded_once() -> None:
    theta, tuned = _pair(torch.bfloat16)
    tau = task_vector(theta, tuned)
    assert tau.dtype == torch.float32
    expected = (theta.double() - 0.3 * tau.double()).float().bfloat16()
    assert torch.equal(forget(theta, tau, 0.3), expected)


def test_surviving_share_sees_what_rounding_swallows() -> None:
    before = torch.ones(4, dtype=torch.bfloat16)
    wanted = torch.tensor([2.0, 2.0, 1e-4, 1e-4])
    after = (before.float() + wanted).bfloat16()
    written, whole = surviving_share(before, after, wanted)
    assert float(written) == pytest.approx(8.0)
    assert float(whole) == pytest.approx(8.0 + 2e-8, abs=1e-9)
    small = torch.full((4,), 1e-4)
    written, _ = surviving_share(before, (before.float() + small).bfloat16(), small)
    assert float(written) == 0.0


def test_residual_is_a_mean_of_ratios() -> None:
    now, before = torch.tensor([0.2, 0.3]), torch.tensor([0.4, 0.1])
    assert float(old_answer_residual(now, before)) == pytest.approx((0.5 + 3.0) / 2)
    assert float(old_answer_residual(before, before)) == 1.0


def test_errors_name_the_argument() -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"`tuned` .* \[2\], but has \[3\]"):
        task_vector(a, b)
    with pytest.raises(ValueError, match="`tau`"):
        forget(a, b, 1.0)
    with pytest.raises(ValueError, match="no old answer"):
        old_answer_residual(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="`p_before` is expected to be positive"):
        old_answer_residual(a, a)


def test_importance_is_half_where_both_answers_need_a_parameter_alike() -> None:
    fisher = _pair()[0].square()
    half = forgetting_importance(fisher, fisher)
    torch.testing.assert_close(half, torch.full_like(half, 0.5))
    assert torch.equal(forgetting_importance(fisher, torch.zeros_like(fisher)), fisher.sign())
    assert not forgetting_importance(torch.zeros_like(fisher), fisher).any()
    assert not forgetting_importance(torch.zeros(2), torch.zeros(2)).any()


def test_importance_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match="`retain` is expected to have the shape of `forget`"):
        forgetting_importance(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="`alpha`"):
        forgetting_importance(torch.ones(2), torch.ones(2), -1.0)
