# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""No id, path or text steers the terminal that it is shown on, or becomes markup in a card."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_edit import MemoryWrite
from lightning_edit.__main__ import main
from lightning_edit.artifacts.cards import model_card
from lightning_edit.cli import trainer
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.side_memory import EditMemory, MemoryEntry

NASTY = "a\x1b[31m\x9b0m\u202eb<script>alert(1)</script>"
STEERING = ("\x1b", "\x9b", "\u202e")


class NastyRows(EditMemory):
    """Holds rows and does nothing with them."""

    fields = ("row",)

    def hook(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        return [model.register_forward_hook(lambda *_: None)]


def test_errors_of_the_command_line_are_spelt_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", str(tmp_path / NASTY.replace("/", "_"))]) == 1
    with pytest.raises(SystemExit):
        main(["fit", f"--{NASTY}", "x"])
    shown = capsys.readouterr().err
    assert "a␛[31m" in shown
    assert not [sign for sign in STEERING if sign in shown]


def test_logs_and_warnings_of_the_command_line_are_spelt_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(warnings, "filters", warnings.filters[:])
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(logger, "filters", logger.filters[:])
    for name in ("lightning.pytorch", "lightning.fabric.utilities.rank_zero"):
        other = logging.getLogger(name)
        monkeypatch.setattr(other, "filters", other.filters[:])
    trainer._quiet_down()
    with caplog.at_level("INFO"):
        logger.info("edits of %s", NASTY)
    shown = caplog.text + warnings.formatwarning(f"not {NASTY}", UserWarning, "file", 1)
    assert shown.count("a␛[31m") == 2
    assert not [sign for sign in STEERING if sign in shown]


def test_cards_of_memory_edits_hold_ids_as_text(tmp_path: Path) -> None:
    entry = MemoryEntry({"row": torch.ones(2)}, {NASTY: {"prompt": NASTY, "target": NASTY}})
    edit = MemoryWrite("NastyRows", {}, {NASTY: entry}, Provenance("ROME", request_ids=(NASTY,)))
    model = nn.Linear(2, 2)
    edit.apply_(model)
    cards = [
        (edit.save(tmp_path / "edit") / "README.md").read_text(),
        model_card(edit, MemoryWrite.of(model), []),
    ]
    for card in cards:
        assert "<script" not in card
        assert not [sign for sign in STEERING if sign in card]
