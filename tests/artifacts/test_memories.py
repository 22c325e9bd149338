# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits of memories go through the same verbs as edits of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lightning_edit import EditMemory, MemoryWrite, WeightDelta
from lightning_edit.artifacts import apply, diff, export, list_, revert
from lightning_edit.artifacts.outcomes import EntryRow, SavedEdit
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.demos import tiny_model, tiny_tokenizer
from lightning_edit.models import load_model
from tests.artifacts.helpers import same_weights, weights
from tests.sealed import rewrite

SETTINGS = {"module": "model.layers.2.mlp.down_proj", "stack": "decoder", "replacement": "last"}
NORM = (2 + 2 + 0.25) ** 0.5  # of each entry here


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseModelInfo:
    """The base of all edits here, saved in ``base``."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    return BaseModelInfo("base", None, "float32", weight_hash(model), model.num_parameters())


def _entry(name: str, value: float = 1.0) -> MemoryEntry:
    """An entry of GRACE's codebook; its value decides what the layer says near its key."""
    key, answer = torch.zeros(64), torch.zeros(32)
    key[:2], answer[:2] = 1.0, value
    tensors = {"keys": key, "values": answer, "radii": torch.tensor(0.5)}
    kept = {"prompt": f"The capital of {name} is", "target": "Rome", "distance": 0.0}
    return MemoryEntry(tensors, {name: kept}, {"label": [7], "initial_radius": 0.5})


def _saved(
    folder: str,
    base: BaseModelInfo,
    *names: str,
    removed: Sequence[str] = (),
    value: float = 1.0,
    **more: Any,
) -> MemoryWrite:
    """An edit that adds some entries and takes others away, saved in a folder."""
    entries: dict[str, MemoryEntry | None] = {name: _entry(name, value) for name in names}
    entries |= dict.fromkeys(removed)
    replaced = {name: _entry(name) if name in removed else None for name in entries}
    provenance = Provenance("GRACE", "", {}, base, tuple(entries))
    edit = MemoryWrite("Codebook", SETTINGS, entries, provenance, replaced)
    edit.save(folder, **more)
    return edit


def _held(folder: str) -> list[str]:
    memory = EditMemory.find(load_model(folder, dtype="auto"))
    return [] if memory is None else list(memory.entries)


# -- apply and revert ------------------------------------------------------------------------


def test_the_memory_lies_in_the_folder_beside_the_weights(base: BaseModelInfo) -> None:
    edit = _saved("run/delta", base, "velmora", "dorin")
    done = apply("run")
    assert (done.what, done.folder) == ("edited model", Path("edited"))
    assert done.facts["changed"] == "2 entries of a memory (Codebook)"
    assert done.notes[0].startswith("`lightning_edit.load_model` loads the model with its memory")
    assert done.notes[1] == "Undo with: lightning-edit revert run/delta --model edited"
    loaded = load_model("edited")
    memory = EditMemory.find(loaded)
    assert memory is not None
    assert memory.is_hooked
    for name, entry in memory.entries.items():
        assert entry.equals(edit.entries[name])
    assert weight_hash(loaded) == base.sha256
    held = MemoryWrite.load("edited/edit_memory")
    assert held.provenance == edit.provenance
    assert list(held.replaced.values()) == [None, None]


def test_other_programs_load_the_base(base: BaseModelInfo) -> None:
    _saved("delta", base, "velmora")
    apply("delta")
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(
        "edited", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert EditMemory.find(plain) is None
    assert weight_hash(plain) == base.sha256
    card = Path("edited/README.md").read_text(encoding="utf-8")
    assert "library_name: lightning_edit" in card
    assert "Its memory (Codebook, 1 entry) lies in `edit_memory`." in card
    assert "`from_pretrained` loads the unedited base" in card
    assert 'load_model("path/to/this/folder")' in card


def test_what_was_applied_is_taken_out_again(base: BaseModelInfo) -> None:
    _saved("first", base, "velmora", "dorin")
    _saved("second", base, "essia", removed=["velmora"])
    apply("first", output="one")
    apply("second", "one", "two")
    assert _held("two") == ["dorin", "essia"]
    done = revert("second", "two", "back")
    assert set(_held("back")) == {"velmora", "dorin"}
    assert done.notes[0].startswith("Every bit of the weights is that of the base")
    assert done.notes[1] == "The memory still holds 2 entries of other edits."
    assert "Its memory (Codebook, 2 entries)" in Path("back/README.md").read_text(encoding="utf-8")
    done = revert("first", "back", "restored")
    assert any(note.startswith("Every bit is that of the base") for note in done.notes)
    assert _held("restored") == []
    assert not Path("restored/edit_memory").exists()
    assert not Path("restored/README.md").exists()
    assert same_weights(weights("restored"), weights("base"))


def test_what_one_folder_holds_can_be_taken_out_of_another(base: BaseModelInfo) -> None:
    _saved("delta", base, "velmora")
    apply("delta")
    revert("edited/edit_memory", "edited")
    assert _held("restored") == []
    apply("edited/edit_memory", output="again")
    assert _held("again") == ["velmora"]


def test_a_memory_stays_exact_beside_rounded_weights(base: BaseModelInfo) -> None:
    edit = _saved("delta", base, "velmora", value=1 / 3)
    apply("delta", dtype="bfloat16")
    loaded = load_model("edited", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    memory = EditMemory.find(loaded)
    assert memory is not None
    assert memory.entries["velmora"].equals(edit.entries["velmora"])
    assert memory.entries["velmora"].equals(MemoryWrite.load("delta").entries["velmora"])
    apply("delta", "edited", "wider", dtype="float32", check=False)
    memory = EditMemory.find(load_model("wider"))
    assert memory is not None
    assert memory.entries["velmora"].equals(edit.entries["velmora"])
    with pytest.raises(ArtifactError, match=r"another edit is in it too.*--no_check"):
        revert("delta", "edited")
    revert("delta", "edited", check=False)
    assert _held("restored") == []


def test_a_model_has_an_edit_of_weights_and_a_memory(base: BaseModelInfo) -> None:
    _saved("memory", base, "velmora")
    WeightDelta({"model.norm.weight": torch.ones(32)}, Provenance("ROME", base=base)).save("delta")
    apply("memory", output="one")
    done = apply("delta", "one", "two")
    assert any("loads the model with its memory" in note for note in done.notes)
    assert _held("two") == ["velmora"]
    card = Path("two/README.md").read_text(encoding="utf-8")
    assert "loads the weights without it" in card
    held = MemoryWrite.load("two/edit_memory").provenance
    assert held.method == "GRACE"
    assert held.base.sha256 == weight_hash(load_model("two")) != base.sha256


def test_edits_that_do_not_belong_are_refused(base: BaseModelInfo) -> None:
    _saved("delta", base, "velmora")
    tiny_model("gpt2").save_pretrained("other")
    with pytest.raises(ArtifactError, match="belongs to base with the weight hash"):
        apply("delta", "other")
    with pytest.raises(ArtifactError, match="has no memory: the edit is not applied here"):
        revert("delta", "base")
    apply("delta")
    _saved("else", base, "dorin")
    with pytest.raises(ArtifactError, match="'dorin' of this memory is not what this edit wrote"):
        revert("else", "edited")
    assert not Path("restored").exists()


def test_an_edit_that_cannot_be_undone_says_so(base: BaseModelInfo) -> None:
    _saved("bare", base, "velmora", originals=False)
    assert "saved without originals" in apply("bare", output="one").notes[1]
    _saved("late", base, "velmora", value=2.0)
    note = apply("late", "one", "two").notes[1]
    assert note.startswith("The memory did not hold what the saved edit keeps of 'velmora'")


def test_a_memory_of_other_weights_is_not_loaded(base: BaseModelInfo) -> None:
    _saved("delta", base, "velmora")
    apply("delta")
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained("edited")
    with pytest.raises(ArtifactError, match=r"`edited/edit_memory` is not of the weights beside"):
        load_model("edited")
    assert _held("base") == []


# -- export ----------------------------------------------------------------------------------


def test_export(base: BaseModelInfo) -> None:
    _saved("delta", base, "velmora")
    with pytest.raises(ArtifactError, match=r"changes no weights, so no LoRA adapter can hold it"):
        export("delta")
    assert not Path("exported").exists()
    assert export("delta", "hf").what == "edited model"
    assert _held("exported") == ["velmora"]


# -- diff ------------------------------------------------------------------------------------


def test_diff_of_two_edits(base: BaseModelInfo) -> None:
    _saved("one", base, "velmora", "dorin", removed=["essia"])
    _saved("two", base, "velmora", "essia", value=2.0)
    compared = diff("one", "two")
    assert compared.rows == ()
    assert [replace(row, norm_first=None, norm_second=None) for row in compared.entries] == [
        EntryRow("velmora", ("velmora",), "added", "added", is_same=False),
        EntryRow("dorin", ("dorin",), "added"),
        EntryRow("essia", ("essia",), "removed", "added", is_same=False),
    ]
    other = (4 * 2 + 2 + 0.25) ** 0.5
    assert [row.norm_first for row in compared.entries] == pytest.approx([NORM, NORM, None])
    assert [row.norm_second for row in compared.entries] == pytest.approx([other, None, other])
    assert compared.requests_both == ("velmora", "essia")
    assert compared.requests_first == ("dorin",)
    assert compared.notes == ()
    assert [row.is_same for row in diff("one", "one").entries] == [True, True, True]
    _saved("bare", base, "dorin", originals=False)
    assert diff("bare", "one").entries[0].first == "written"


def test_diff_of_an_edit_with_another_kind(base: BaseModelInfo) -> None:
    _saved("memory", base, "velmora")
    provenance = Provenance("ROME", base=base, request_ids=("velmora", "dorin"))
    WeightDelta({"model.norm.weight": torch.ones(32)}, provenance).save("delta")
    compared = diff("memory", "delta")
    assert [row.name for row in compared.rows] == ["model.norm.weight"]
    assert [row.name for row in compared.entries] == ["velmora"]
    assert compared.requests_both == ("velmora",)
    assert compared.notes[0].startswith("The one changes weights, the other a memory")
    MemoryWrite("PromptMemory", {"facts": 1}, {"velmora": None}, provenance).save("prompts")
    [note] = diff("memory", "prompts").notes
    assert note.startswith("The edits belong to different memories: a Codebook with {'module'")


def test_diff_of_two_models(base: BaseModelInfo) -> None:
    _saved("first", base, "velmora", "dorin")
    _saved("second", base, "velmora", "essia", removed=["dorin"], value=2.0)
    apply("first", output="one")
    apply("second", "one", "two")
    compared = diff("base", "one")
    assert compared.notes == ("All parameters are equal.",)
    assert [(row.name, row.first, row.second) for row in compared.entries] == [
        ("velmora", None, "added"),
        ("dorin", None, "added"),
    ]
    found = {row.name: row.second for row in diff("one", "two").entries}
    assert found == {"velmora": "replaced", "dorin": "removed", "essia": "added"}
    assert {row.second for row in diff("one", "base").entries} == {"removed"}


def test_diff_of_an_edit_and_a_model(base: BaseModelInfo) -> None:
    _saved("delta", base, "velmora", "dorin")
    _saved("part", base, "velmora")
    apply("delta")
    apply("part", output="half")
    compared = diff("delta", "edited")
    assert compared.notes == ("The edit is in the model.",)
    assert [row.is_same for row in compared.entries] == [True, True]
    compared = diff("base", "delta")
    assert (compared.first, compared.second) == ("delta", "base")
    assert compared.notes == ("The model has no memory: the edit is not in it.",)
    assert [row.second for row in compared.entries] == [None, None]
    assert diff("delta", "half").notes[0].startswith("The model's memory is here neither as it was")
    _saved("more", base, "essia")
    assert diff("more", "edited").notes[0].endswith("as it was before: the edit is not in it.")


# -- list ------------------------------------------------------------------------------------


def test_list(base: BaseModelInfo) -> None:
    _saved("run/delta", base, "velmora", removed=["dorin"])
    [edit] = list_("run")
    assert isinstance(edit, SavedEdit)
    assert (edit.method, edit.memory, edit.entries) == ("GRACE", "Codebook", ("velmora", "dorin"))
    assert edit.requests == {"velmora": "The capital of velmora is → Rome", "dorin": ""}
    assert edit.parameters == ()
    _saved("first/delta", base, "dorin")
    apply("first", output="one")
    apply("run", "one")
    [held] = list_("edited")
    assert isinstance(held, SavedEdit)
    assert (held.path, held.entries) == (Path("edited/edit_memory"), ("velmora",))
    rewrite(Path("run/delta"), entries=[{}])
    [damaged] = list_("run")
    assert isinstance(damaged, SavedEdit)
    assert "is damaged" in damaged.problem
