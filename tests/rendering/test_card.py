# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Cards hold metadata that the hub knows, and no markup out of ids, names and papers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from lightning_edit.artifacts.adapters import save_adapter
from lightning_edit.artifacts.cards import model_card
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.lora import LoRAFactors
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.report import RunReport, render_card
from tests.report.sample import HOSTILE, hostile

EVIL = f"{HOSTILE}\n---\nlicense: mit\n\x1b]0;x\x07 \x9b31m \u202e ``` | ![x](http://evil)"
ORIGIN = Provenance(
    method=EVIL, paper=EVIL, base=BaseModelInfo(id=EVIL, sha256=EVIL), request_ids=(EVIL, "b")
)


def cards(folder: Path, origin: Provenance) -> Iterator[str]:
    """All kinds of cards."""
    entry = MemoryEntry({"bias": torch.ones(2)}, {origin.request_ids[0]: {}})
    memory = MemoryWrite("Biases", {}, {origin.request_ids[0]: entry, "gone": None}, origin)
    delta = WeightDelta({origin.request_ids[0]: torch.ones(2, 2)}, origin)
    edits: list[Edit] = [delta, memory]
    for i, edit in enumerate(edits):
        yield (edit.save(folder / str(i)) / "README.md").read_text(encoding="utf-8")
    yield model_card(memory, memory)
    yield model_card(delta)
    factors = {origin.request_ids[0]: LoRAFactors(torch.ones(1, 2), torch.ones(2, 1), False, 0.5)}
    save_adapter(factors, folder / "lora", provenance=origin)
    yield (folder / "lora" / "README.md").read_text(encoding="utf-8")
    base = {"id": origin.base.id, "sha256": origin.base.sha256}
    # Code is shown as it is, so the folder's name in it may hold anything.
    run = replace(hostile(), method=origin.method, paper=origin.paper, model=base, artifact="")
    yield render_card(run)


def test_no_markup_gets_through(tmp_path: Path) -> None:
    found = list(cards(tmp_path, ORIGIN))
    assert len(found) == 6
    for card in found:
        front, text = card.split("\n---\n", 1)
        assert yaml.safe_load(front.removeprefix("---\n")).keys() == {"library_name", "tags"}
        # In code, markup is text; what opens it is a run of backticks that is not escaped.
        prose = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)
        assert "<script" not in prose
        assert "![x]" not in prose
        assert "&lt;script&gt;" in prose
        assert "\nlicense: mit" not in text
        assert not set("\x00\x07\x1b\x9b\u202e") & set(card)


def test_metadata_are_those_of_the_hub(tmp_path: Path) -> None:
    base = BaseModelInfo(id="acme/tiny", sha256="f" * 64)
    origin = Provenance("R-ROME", "https://arxiv.org/abs/2403.07175", base=base, request_ids=("a",))
    libraries = [*["lightning_edit"] * 3, "transformers", "peft", "lightning_edit"]
    for card, library in zip(cards(tmp_path, origin), libraries, strict=True):
        data: Any = ModelCard(card).data
        assert data.to_dict() == {
            "base_model": "acme/tiny",
            "library_name": library,
            "tags": ["knowledge-editing", *(["lora"] if library == "peft" else []), "r-rome"],
        }
        assert "(<https://arxiv.org/abs/2403.07175>)" in card
        assert card.endswith(".\n")


@pytest.mark.parametrize("base", ["", "smollm2", "/home/me/tiny", "models/tiny", "a/b/c", "a.gguf"])
def test_a_base_is_named_where_others_can_look_it_up(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert "base_model" not in render_card(RunReport(method="ROME", model={"id": base}))


def test_a_method_without_a_name_is_no_tag() -> None:
    card = model_card(WeightDelta({}, Provenance(method="⁂")))
    data: Any = ModelCard(card).data
    assert data.tags == ["knowledge-editing"]
    assert "Made with ⁂ for 0 request(s)." in card
