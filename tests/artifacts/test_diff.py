# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits and models are compared, and what they say of each other is true."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lightning_edit.artifacts import apply, diff, revert
from lightning_edit.artifacts.parameter_rows import numerical_rank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError
from tests import zoo
from tests.artifacts.helpers import made_run, weights


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_diff_of_two_edits() -> None:
    one = made_run()
    other = made_run(folder="other", seed=1, layers=(1, 2))
    compared = diff("run", "other/delta")
    assert (compared.first, compared.second) == ("run", "other/delta")
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    assert {row.name for row in compared.rows} == set(names)
    rows = {row.name: row for row in compared.rows}
    assert rows[names[0]].norm_second is None
    assert rows[names[0]].cosine is None
    assert rows[names[1]].norm_first is None
    row = rows[names[2]]
    a, b = one.dense(names[2]).flatten(), other.dense(names[2]).flatten()
    assert row.norm_first == pytest.approx(float(a.norm()), rel=1e-5)
    size = float(weights("base")[names[2]].detach().norm())
    assert row.relative_second == pytest.approx(float(b.norm()) / size, rel=1e-5)
    assert (row.rank_first, row.rank_second) == (2, 2)
    assert row.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-5)
    assert compared.requests_first == ("capital-velmora",)
    assert compared.requests_second == ("language-velmora",)
    assert compared.requests_both == ()
    assert compared.notes == ()


def test_diff_of_an_edit_with_itself() -> None:
    made_run()
    compared = diff("run", "run")
    assert [row.cosine for row in compared.rows] == pytest.approx([1, 1])
    assert compared.requests_both == ("capital-velmora",)
    assert compared.requests_first == compared.requests_second == ()


def test_diff_of_edits_of_different_bases() -> None:
    delta = made_run()
    base = dataclasses.replace(delta.provenance.base, sha256="0" * 64)
    delta.provenance = dataclasses.replace(delta.provenance, base=base)
    delta.save("other")
    [note] = diff("run", "other").notes
    assert note.startswith("The edits belong to different weights: base (")
    names = list(delta.changes)
    WeightDelta({names[0]: torch.ones(3)}).save("third")
    with pytest.raises(ArtifactError, match=r"\[32, 64\] in run and \[3\] in third"):
        diff("run", "third")


def test_diff_of_two_models() -> None:
    delta = made_run()
    apply("run")
    compared = diff("base", "edited")
    assert [row.name for row in compared.rows] == list(delta.changes)
    for row in compared.rows:
        assert row.norm_first is None
        assert row.norm_second == pytest.approx(delta.norms()[row.name], rel=1e-4)
        assert row.rank_second == 2
    revert("run")
    same = diff("base", "restored")
    assert same.rows == ()
    assert same.notes == ("All parameters are equal.",)
    apply("run", output="short", dtype="bfloat16")
    assert "The weights are float32 and bfloat16" in diff("base", "short").notes[0]


def test_diff_of_other_architectures() -> None:
    made_run()
    zoo.build("gpt2").save_pretrained("gpt2")
    with pytest.raises(ArtifactError, match=r"differ in more than values: `model.embed_tokens.wei"):
        diff("base", "gpt2")
    with pytest.raises(ArtifactError, match=r"has no `model.layers.0.mlp.down_proj.weight`"):
        diff("run", "gpt2")


def test_diff_of_an_edit_and_a_model() -> None:
    delta = made_run()
    apply("run")
    for pair in (("run", "edited"), ("edited", "run")):
        compared = diff(*pair)
        assert (compared.first, compared.second) == ("run", "edited")
        assert compared.notes == ("The edit is in the model.",)
        assert [row.cosine for row in compared.rows] == pytest.approx([1, 1])
    compared = diff("run", "base")
    assert compared.notes[0].endswith("the edit is not in it.")
    assert [row.norm_second for row in compared.rows] == [0, 0]
    (delta * 2).save("double")
    apply("double", "base", "other")
    assert "neither its original weights" in diff("run", "other").notes[0]
    made_run(originals=False, folder="bare")
    with pytest.raises(ArtifactError, match=r"in bare does not keep the originals of model.layers"):
        diff("bare", "edited")


@pytest.mark.parametrize("rank", [1, 7, 64])
def test_numerical_rank(rank: int) -> None:
    matrix = torch.randn(150, rank) @ torch.randn(rank, 120)
    assert numerical_rank(matrix) == rank
    assert numerical_rank(matrix + 1e-6 * torch.randn(150, 120)) == rank
    assert numerical_rank(matrix, limit=rank - 1) is None
    assert numerical_rank(matrix[:, :1]) == 1


def test_numerical_rank_of_nothing_and_all() -> None:
    assert numerical_rank(torch.zeros(3, 4)) == 0
    assert numerical_rank(torch.eye(64)) == 64
    assert numerical_rank(torch.eye(65)) is None
    state = torch.get_rng_state()
    numerical_rank(torch.randn(80, 80, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
