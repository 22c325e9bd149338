# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""functional/conflict.py against probabilities worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_edit.functional import conflict_magnitude, ignore_rate, knowledge_distortion


def nll(*probabilities: float) -> Tensor:
    return -torch.tensor(probabilities).log()


def test_magnitude_is_the_share_that_is_lost() -> None:
    found = conflict_magnitude(nll(0.8, 0.5, 0.4, 0.1), nll(0.2, 0.5, 0.6, 0.9))
    assert found.tolist() == pytest.approx([0.75, 0.0, -0.5, -1.0], abs=1e-6)


def test_distortion_is_of_shares_among_the_right_answers() -> None:
    # Shares 3/4 and 1/4 become 1/4 and 3/4, whose mean is even.
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(knowledge_distortion(nll(0.3, 0.1), nll(0.2, 0.6))) == pytest.approx(expected)
    assert float(knowledge_distortion(nll(0.3, 0.1), nll(0.6, 0.2))) == pytest.approx(0.0, abs=1e-7)
    apart = knowledge_distortion(nll(1.0, 1e-300), torch.tensor([2000.0, 0.0]))
    assert float(apart) == pytest.approx(math.log(2))


def test_ignore_rate_counts_what_has_become_less_likely() -> None:
    assert float(ignore_rate(nll(0.5, 0.2, 0.1, 0.3), nll(0.4, 0.3, 0.0, 0.3))) == 0.5
