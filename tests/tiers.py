# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which tests `make test` leaves to `make test-slow`, beside those that are marked in their files.

Nothing is left out of both. Continuous integration runs both.
"""

from __future__ import annotations

import re

import pytest

__all__ = ["mark_slow"]

#: Beginnings of node ids.
SLOW = (
    # Two processes, or the package in a copy of its own.
    "tests/distributed/",
    "tests/test_add_a_method.py",
    "tests/modules/fine_tuning/test_tuning.py::test_two_processes",
    "tests/callbacks/test_causal_tracing.py::test_two_processes",
    # Parity with figures of the default model; those of tiny models stay.
    "tests/callbacks/test_f_learning_goldens.py",
    "tests/modules/locate_then_edit/test_attention_sink.py::test_the_default_model_is_left_sound",
    "tests/modules/locate_then_edit/test_kn.py::test_the_capital_of_france",
    "tests/modules/locate_then_edit/test_mass_edit.py::test_strengths_and_null_spaces",
    "tests/modules/locate_then_edit/test_rome.py::test_figures_of_the_reference_implementation",
    "tests/modules/fine_tuning/test_fine_tune.py::test_goldens[FT_all_layers",
    "tests/modules/fine_tuning/test_tuning.py::test_goldens_of_full_and_lora_tuning",
)
#: Editors and their presets for whom another one of the family stands in what every editor is asked
#: in tests/contract. A new editor is asked all of it.
ALIKE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"RROME|PMET|EMMET|AlphaEdit|KN|UltraEdit|LocFT|LoRATuning|KE|MALMEN|RLEdit|IKE|SCR|WISE|"
    r"CaliNET|TrainedEditor|RememberingEditor|"
    r"r_rome|pmet|emmet|alpha_edit|kn|ultra_edit|loc_ft|lora_tuning|ke|malmen|rledit|ike|scr|wise|"
    r"calinet|trained_editor|ft_l|ft_m"
    r")(?![A-Za-z0-9_])"
)


def mark_slow(item: pytest.Item) -> None:
    """Marks a test that is left to `make test-slow`."""
    _, _, case = item.nodeid.partition("[")
    is_alike = item.nodeid.startswith("tests/contract/") and ALIKE.search(case)
    if is_alike or item.nodeid.startswith(SLOW):
        item.add_marker(pytest.mark.slow)
