# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Models are written whole or not at all, and only what was written here is replaced."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_edit.artifacts import apply, export, revert
from lightning_edit.artifacts.folders import MANIFEST, check_output, save_model
from lightning_edit.core.errors import ArtifactError
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
from lightning_edit.models import load_model, load_tokenizer
from tests.artifacts.helpers import low_rank_edit, saved_base

CARD = "---\ntags:\n- knowledge-editing\n---\n"


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model = tiny_model()
    source = saved_base(model, tmp_path)
    assert save_model(model, tmp_path / "copy", source=source, card=CARD)
    tokenizer = load_tokenizer(str(tmp_path / "copy"))
    prompt = tiny_requests(1)[0].prompt
    assert tokenizer(prompt).input_ids == tiny_tokenizer()(prompt).input_ids
    assert (tmp_path / "copy" / "README.md").read_text() == CARD


def test_without_a_tokenizer(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    assert not save_model(model, tmp_path / "copy", source=str(tmp_path / "base"))
    assert not (tmp_path / "copy" / "README.md").exists()
    assert load_model(str(tmp_path / "copy")).config.hidden_size == 32


def test_a_crash_leaves_the_earlier_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    source = saved_base(model, tmp_path)
    save_model(model, tmp_path / "copy", source=source, card=CARD)

    def failing(folder: Path, **_: Any) -> None:
        (folder / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", failing)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tmp_path / "copy", source=source, card="later")
    assert (tmp_path / "copy" / "README.md").read_text() == CARD
    load_model(str(tmp_path / "copy"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "copy"]


# -- only what was written here is replaced --------------------------------------------------


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("verb", ["apply", "revert", "export", "hf", "save_model"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_project_with_a_model_in_it_is_kept(verb: str, listed: bool, tmp_path: Path) -> None:
    model = tiny_model()
    base, delta, edited = saved_base(model, tmp_path), tmp_path / "delta", tmp_path / "edited"
    edit = low_rank_edit(model, base)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    edit.apply_(model)
    edit.seal(model, originals).save(delta)
    apply(str(delta), output=str(edited), check=False)
    mine = tmp_path / "mine"
    shutil.copytree(edited, mine)
    calls: dict[str, Any] = {
        "apply": partial(apply, str(delta), output=str(mine), check=False, force=True),
        "revert": partial(revert, str(delta), str(edited), str(mine), check=False, force=True),
        "export": partial(export, str(delta), "lora", str(mine), force=True),
        "hf": partial(export, str(delta), "hf", str(mine), force=True),
        "save_model": partial(save_model, model, mine, source=base),
    }
    if not listed:
        (mine / MANIFEST).unlink()
    for name in ("src", ".git"):
        (mine / name).mkdir()
        (mine / name / "file").write_text("mine")
    (mine / "notes.txt").symlink_to(tmp_path / "elsewhere")
    before = _contents(mine)
    with pytest.raises(ArtifactError, match=r"would delete it: \.git/, notes\.txt, src/\. Give"):
        calls[verb]()
    assert _contents(mine) == before
    for name in ("src", ".git"):
        shutil.rmtree(mine / name)
    (mine / "notes.txt").unlink()
    calls[verb]()
    assert (mine / MANIFEST).is_file()


def test_files_of_a_tokenizer_that_are_listed_are_ours(tmp_path: Path) -> None:
    model = tiny_model()
    source = saved_base(model, tmp_path)
    save_model(model, tmp_path / "copy", source=source)
    listed = json.loads((tmp_path / "copy" / MANIFEST).read_text())
    odd = tmp_path / "copy" / "templates" / "odd.jinja"
    odd.parent.mkdir()
    odd.write_text("")
    with pytest.raises(ArtifactError, match="delete it: templates/"):
        check_output(tmp_path / "copy", force=True)
    listed["files"].append("templates/odd.jinja")
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps(listed))
    check_output(tmp_path / "copy", force=True)


def test_a_readme_of_ones_own_is_kept(tmp_path: Path) -> None:
    source = saved_base(tiny_model(), tmp_path)
    (Path(source) / "README.md").write_text("# My project\n")
    with pytest.raises(ArtifactError, match=r"delete it: README\.md\."):
        check_output(source, force=True)
    for damaged in ("{", "[]", '{"files": 3}'):
        (Path(source) / MANIFEST).write_text(damaged)
        with pytest.raises(ArtifactError, match=r"delete it: README\.md, lightning_edit\.json"):
            check_output(source, force=True)


# -- where to write --------------------------------------------------------------------------


def test_output_folders(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new", force=False) == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", force=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"file` is a file"):
        check_output(tmp_path / "file", force=True)


def test_output_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    (tmp_path / "old" / "model.safetensors").write_text("")
    with pytest.raises(ArtifactError, match=r"is not empty. Give another `output`, or `force`"):
        check_output(tmp_path / "old", force=False)
    with pytest.raises(ArtifactError, match="a model or an adapter that was not written here"):
        check_output(tmp_path / "old", force=True)
    (tmp_path / "old" / "README.md").write_text(CARD)
    check_output(tmp_path / "old", force=True)
    (tmp_path / "old" / "config.json").rename(tmp_path / "old" / "thesis.tex")
    with pytest.raises(ArtifactError, match="neither a model nor an adapter, so `force` does not"):
        check_output(tmp_path / "old", force=True)


@pytest.mark.parametrize("needed", [".", "delta"])
def test_output_must_not_hold_the_inputs(
    needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model" / "delta").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot be replaced: `model.*` in it is needed"):
        check_output("model", force=True, inputs=("acme/tiny", Path("model") / needed))
