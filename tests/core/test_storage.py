# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Saved edits come back bit for bit, or with an error that says what is wrong with them."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.files import atomic_folder, file_hash
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.core.request import EditRequest
from lightning_edit.core.storage import foreign_entries, read_config
from tests.sealed import rewrite


def _delta() -> WeightDelta:
    generator = torch.Generator().manual_seed(0)
    return WeightDelta(
        {
            "a.weight": LowRank(
                torch.randn(4, 2, generator=generator), torch.randn(3, 2, generator=generator)
            ),
            "b.bias": torch.randn(5, generator=generator),
        },
        Provenance(
            method="ROME",
            paper="https://arxiv.org/abs/2202.05262",
            settings={"layers": [1], "weight": 0.5},
            base=BaseModelInfo("acme/tiny", "main", "bfloat16", "ab" * 32, 17),
            request_ids=("capital-velmora", "首都", "half \ud83d"),
        ),
        originals={"a.weight": torch.randn(4, 3, generator=generator).bfloat16()},
        hashes={"a.weight": ("0" * 64, "1" * 64)},
    )


def _saved(folder: Path) -> Path:
    return _delta().save(folder / "delta")


# -- round trip ------------------------------------------------------------------------------


def test_texts_and_the_time_are_kept(tmp_path: Path) -> None:
    request = EditRequest(
        "The capital of {} is",
        "France",
        "Rome",
        "Paris",
        rephrases=("France, whose capital is",),
        id="france",
        metadata={"ticket": "KB-7", "reviewers": ["ada", 2]},
    )
    delta = _delta()
    delta.provenance = delta.provenance.answering(["france", "other"], {"france": request})
    folder = delta.save(tmp_path / "delta")
    loaded = WeightDelta.load(folder)
    assert loaded.provenance == delta.provenance
    assert loaded.provenance.created == delta.provenance.created
    [kept] = loaded.provenance.requests
    assert kept == request.fact() != request
    config = json.loads((folder / "delta_config.json").read_text("utf-8"))
    assert config["requests"] == [
        {
            "prompt": "The capital of France is",
            "subject": "France",
            "target_new": "Rome",
            "target_old": "Paris",
            "id": "france",
            "metadata": {"ticket": "KB-7", "reviewers": ["ada", 2]},
        }
    ]
    made = datetime.fromisoformat(config["created"])
    assert abs((datetime.now(UTC) - made).total_seconds()) < 600
    card = (folder / "README.md").read_text("utf-8")
    assert "| france | The capital of France is | Paris | Rome | ticket: KB-7; reviewers:" in card
    # An edit of before holds neither, and is none the worse for it.
    rewrite(folder, requests=[], created="")
    assert WeightDelta.load(folder).provenance.requests == ()
    rewrite(folder, requests=[{"prompt": "x"}])
    with pytest.raises(ArtifactError, match="is damaged"):
        WeightDelta.load(folder)


def test_round_trip(tmp_path: Path) -> None:
    delta, loaded = _delta(), WeightDelta.load(_saved(tmp_path))
    assert loaded.provenance == delta.provenance
    assert loaded.hashes == delta.hashes
    first, second = delta.changes["a.weight"], loaded.changes["a.weight"]
    assert isinstance(first, LowRank)
    assert isinstance(second, LowRank)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v, second.v)
    assert torch.equal(delta.dense("b.bias"), loaded.dense("b.bias"))
    assert loaded.originals.keys() == {"a.weight"}
    assert loaded.originals["a.weight"].dtype == torch.bfloat16
    assert torch.equal(loaded.originals["a.weight"], delta.originals["a.weight"])


def test_originals_can_be_left_out(tmp_path: Path) -> None:
    loaded = WeightDelta.load(_delta().save(tmp_path / "delta", originals=False))
    assert loaded.originals == {}
    assert set(load_file(tmp_path / "delta" / "delta.safetensors")) == {
        "a.weight.u",
        "a.weight.v",
        "b.bias.dense",
    }


def test_shared_memory_is_no_obstacle(tmp_path: Path) -> None:
    u = torch.arange(4.0)[:, None]
    delta = WeightDelta({"a": LowRank(u, u), "b": LowRank(u, u.expand(4, 1)), "c": torch.eye(4).T})
    loaded = WeightDelta.load(delta.save(tmp_path / "delta"))
    assert all(torch.equal(loaded.dense(name), delta.dense(name)) for name in "abc")


def test_the_description(tmp_path: Path) -> None:
    config = json.loads((_saved(tmp_path) / "delta_config.json").read_text(encoding="utf-8"))
    assert config["format_version"] == 2
    assert config["kind"] == "weight_delta"
    assert config["parameters"]["a.weight"] == {
        "shape": [4, 3],
        "rank": 2,
        "original_sha256": "0" * 64,
        "edited_sha256": "1" * 64,
    }
    assert config["parameters"]["b.bias"]["rank"] is None
    assert config["norm"] == pytest.approx(_delta().norm())
    assert read_config(tmp_path / "delta")["request_ids"] == _delta().provenance.request_ids


def test_the_card(tmp_path: Path) -> None:
    card = (_saved(tmp_path) / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nbase_model: acme/tiny\nlibrary_name: lightning_edit\n")
    assert "| `a.weight` | 4 × 3 | 2 |" in card
    assert "| `b.bias` | 5 | dense |" in card
    assert "3 request(s)" in card


# -- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["delta_config.json", "delta.safetensors"])
def test_missing_file(file: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    (folder / file).unlink()
    with pytest.raises(ArtifactError, match=rf"no saved edit: the file `{file}` is missing"):
        WeightDelta.load(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"`.*nowhere` holds no saved edit"):
        WeightDelta.load(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_tensors(size: int, tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    data = (folder / "delta.safetensors").read_bytes()
    (folder / "delta.safetensors").write_bytes(data[:size])
    with pytest.raises(ArtifactError, match=r"delta.safetensors` is damaged .*Restore the file"):
        WeightDelta.load(folder)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    path = folder / "delta.safetensors"
    data = path.read_bytes()
    for position in range(0, len(data), 17):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ArtifactError, match="is damaged"):
            WeightDelta.load(folder)
    path.write_bytes(data)
    WeightDelta.load(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        "null",
        "{}",
        '{"format_version": "one", "parameters": {}}',
        '{"format_version": 1}',
        '{"format_version": 1, "parameters": [1]}',
        '{"format_version": 1, "parameters": {"a": 3}}',
        '{"format_version": 1, "parameters": {}, "base": {"size": 3}}',
        '{"format_version": 1, "parameters": {}, "request_ids": 5}',
        "\xff\xfe",
    ],
)
def test_damaged_description(text: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    (folder / "delta_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"delta_config.json` is damaged"):
        WeightDelta.load(folder)


def test_newer_format(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    # A later version may describe its parameters in another way.
    rewrite(folder, format_version=3, parameters=["a.weight"])
    with pytest.raises(ArtifactError, match=r"format 3, newer than 2.*pip install -U"):
        WeightDelta.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["a.weight.u", "b.bias.dense", "a.weight.original"])
def test_values_that_are_not_finite(name: str, value: float, tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    tensors = load_file(folder / "delta.safetensors")
    tensors[name].view(-1)[1] = value
    save_file(tensors, folder / "delta.safetensors")
    rewrite(folder, tensors_sha256=file_hash(folder / "delta.safetensors"))
    with pytest.raises(ArtifactError, match=rf"`{name}` holds values that are not finite"):
        WeightDelta.load(folder)


def test_files_of_two_edits(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    config = json.loads((folder / "delta_config.json").read_text(encoding="utf-8"))
    shapes = {**config["parameters"], "b.bias": {"shape": [6]}}
    rewrite(folder, parameters=shapes)
    with pytest.raises(ArtifactError, match=r"the shape \[6\], but .* \[5\].*belong together"):
        WeightDelta.load(folder)
    rewrite(folder, parameters={**config["parameters"], "c.weight": {"shape": [1]}})
    with pytest.raises(ArtifactError, match=r"lacks the change of `c.weight`"):
        WeightDelta.load(folder)


# -- a folder is whole or not there ----------------------------------------------------------


def _anything(folder: Path) -> None:
    """Allows whatever is there to be replaced."""


def _contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_crash_while_writing_leaves_the_earlier_folder(tmp_path: Path) -> None:
    target = tmp_path / "delta"
    with atomic_folder(target, _anything) as staging:
        (staging / "file").write_text("earlier")

    def interrupted() -> None:
        with atomic_folder(target, _anything) as staging:
            (staging / "file").write_text("half")
            assert _contents(target) == {"file": "earlier"}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _contents(tmp_path) == {"delta/file": "earlier"}
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


def test_a_crash_while_replacing_leaves_the_earlier_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "delta"
    with atomic_folder(target, _anything) as staging:
        (staging / "file").write_text("earlier")
    replace = os.replace
    calls = []

    def failing(source: Any, destination: Any) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"), atomic_folder(target, _anything) as staging:
        (staging / "file").write_text("later")
    assert len(calls) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
    assert _contents(target) == {"file": "earlier"}


def test_success_leaves_nothing_else(tmp_path: Path) -> None:
    for text in ("earlier", "later"):
        with atomic_folder(tmp_path / "deep" / "delta", _anything) as staging:
            (staging / "file").write_text(text)
    assert _contents(tmp_path) == {"deep/delta/file": "later"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["delta"]
    assert (tmp_path / "deep" / "delta").stat().st_mode & 0o777 == 0o755


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _delta().save("delta")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    _delta().save(".")
    assert (tmp_path / "empty" / "delta_config.json").is_file()


def test_a_failing_save_leaves_the_earlier_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _saved(tmp_path)
    before = (folder / "delta_config.json").read_bytes()
    write_text = Path.write_text

    def failing(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == "delta_config.json":
            write_text(self, "{")
            raise OSError("disk full")
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OSError, match="disk full"):
        (2 * _delta()).save(folder)
    monkeypatch.undo()
    assert (folder / "delta_config.json").read_bytes() == before
    assert WeightDelta.load(folder).norm() == pytest.approx(_delta().norm())


def test_saving_replaces_an_edit_and_nothing_else(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    (2 * _delta()).save(folder)
    assert WeightDelta.load(folder).norm() == pytest.approx(2 * _delta().norm())
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds other files \(notes.txt\).*own, such as"):
        _delta().save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ArtifactError, match=r"`.*notes.txt` is a file"):
        _delta().save(folder / "notes.txt")
    mine = tmp_path / "mine"
    (mine / "delta.safetensors").mkdir(parents=True)
    (mine / "delta_config.json").symlink_to(folder / "notes.txt")
    (mine / "README.md").write_text("# My project\n")
    others = r"\(README.md, delta.safetensors/, delta_config.json\)"
    with pytest.raises(ArtifactError, match=f"holds other files {others}"):
        _delta().save(mine)
    assert (mine / "README.md").read_text() == "# My project\n"


def test_what_is_put_into_a_folder_while_it_is_written_is_kept(tmp_path: Path) -> None:
    folder = _saved(tmp_path)

    def check(place: Path) -> None:
        if foreign_entries(place, {path.name for path in folder.glob("delta*")} | {"README.md"}):
            raise ArtifactError("foreign")

    with pytest.raises(ArtifactError, match="foreign"), atomic_folder(folder, check):
        (folder / ".git").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    assert (folder / ".git").is_dir()
    WeightDelta.load(folder)
