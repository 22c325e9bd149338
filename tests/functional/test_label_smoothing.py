# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""functional/label_smoothing.py against the cross-entropy of smoothed targets, written out."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from lightning_edit.functional.label_smoothing import smoothed_nll


def test_smoothing_shares_out_what_it_takes() -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 6, 2])
    rest = 0.1 / 6
    shares = torch.full((4, 7), rest).scatter(1, targets[:, None], 1 - 0.1)
    wanted = -(shares * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(smoothed_nll(logits, targets, 0.1), wanted)
    plain = cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(smoothed_nll(logits, targets, 0.0), plain)
    assert smoothed_nll(logits.bfloat16(), targets).dtype == torch.float32
