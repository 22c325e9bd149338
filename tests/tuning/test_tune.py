# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Settings for a model that nobody chose them for: by rules, by measurement, into a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import lightning_edit
from lightning_edit import EditDataModule, EditError
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.tracing.causal_tracing import TracingResult
from lightning_edit.tuning import rules
from lightning_edit.tuning.rules import ModelAtHand, axes_of, layers_to_try
from lightning_edit.tuning.tune import _Candidate, tune
from tests.runs import run_here


@pytest.fixture(scope="module")
def at() -> ModelAtHand:
    return ModelAtHand(*trained_tiny_model(), tiny_requests(2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = trained_tiny_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_layers_are_those_of_depth_and_of_tracing(
    at: ModelAtHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the tiny model MLPs do not hold the facts, so that tracing proposes none.
    assert layers_to_try(lightning_edit.ROME, at) == [[1]]  # a sixth of four, rounded
    asked: list[tuple[int, int]] = []

    def proposed(result: TracingResult, count: int) -> list[int]:
        asked.append((len(result.facts), count))
        return [2]

    monkeypatch.setattr(rules, "propose_layers", proposed)
    # As traced, and a tenth and a fifth of the depth above: by no whole layer, and by one.
    assert layers_to_try(lightning_edit.ROME, at) == [[1], [2], [3]]
    assert asked == [(2, 1)]


def test_a_method_is_asked_for_what_it_has(at: ModelAtHand) -> None:
    rome = {axis.name: axis.values for axis in axes_of(lightning_edit.ROME, at)}
    memit = {axis.name: axis.values for axis in axes_of(lightning_edit.MEMIT, at)}
    assert list(rome) == ["layers", "clamp_norm_factor", "context_templates"]
    assert rome["clamp_norm_factor"] == [4.0, 2.0, 8.0]
    assert memit["written_share"] == [0.9, 0.8, 0.97]
    assert memit["clamp_norm_factor"] == [0.75, 0.375, 1.5]
    # Contexts as each of the two weighs them, both of which its class accepts.
    for cls, axes in ((lightning_edit.ROME, rome), (lightning_edit.MEMIT, memit)):
        own, more = axes["context_templates"]
        assert own is None
        made = cls.from_model(at.model, at.tokenizer, context_templates=more)
        assert len(made.templates) == 21
    groups = memit["context_templates"][1]
    assert isinstance(groups, list)
    assert [len(group) for group in groups] == [1, 20]


def test_no_metric_makes_up_for_another() -> None:
    def candidate(*rates: float) -> _Candidate:
        metrics = zip(("reliability", "generality", "locality"), rates, strict=True)
        both = ("teacher_forced", "autoregressive")
        return _Candidate("", {}, {(m, r): rate for m, rate in metrics for r in both})

    assert candidate(1.0, 0.5, 0.5).score == pytest.approx(3 / 5)
    assert candidate(1.0, 1.0, 0.0).score == 0.0
    assert candidate(0.7, 0.7, 0.7).score > candidate(1.0, 1.0, 0.4).score
    assert _Candidate("failed", {}, {}).score == 0.0


def test_the_command_writes_a_preset_that_fit_takes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {
        "class_path": "EditDataModule",
        "init_args": {"requests": [request.to_dict() for request in tiny_requests(4)]},
    }
    config = tmp_path / "tune.yaml"
    settings = {"model": model, "methods": ["MEMIT"], "data": facts, "facts": 2}
    config.write_text(yaml.safe_dump({**settings, "max_new_tokens": 4, "accelerator": "cpu"}))
    out = tmp_path / "out"
    words = ["tune", "-c", str(config), "--out", str(out), "--progress=false"]
    assert run_here(words) == 0
    printed = capsys.readouterr().out
    assert "0.97" in printed
    assert str(out / "memit.yaml") in printed.replace("\n", "")
    text = (out / "memit.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# MEMIT for {model}, chosen by `lightning-edit tune`.")
    rows = [line for line in text.splitlines() if line.startswith("# | ")]
    assert [row.split("|")[1].strip() for row in rows] == ["settings", "the class's own", "tuned"]
    section = yaml.safe_load(text)["model"]
    assert section["init_args"].pop("model") == model
    assert {"layers", "written_share", "clamp_norm_factor"} <= set(section["init_args"])
    lightning_edit.MEMIT(**section["init_args"])
    # What was chosen is the best of what was measured, one setting after another.
    frame = tune(
        model,
        ["MEMIT"],
        EditDataModule(requests=tiny_requests(4)),
        2,
        str(out),
        max_new_tokens=4,
        accelerator="cpu",
        progress=False,
    )
    searched = frame[frame["data"] == "searched"]
    best = searched.loc[searched["score"].idxmax()]
    tuned = frame.iloc[-1]
    assert tuned["label"] == "tuned"
    assert searched[searched["label"].str.startswith("context")]["score"].max() == best["score"]
    # The second search found all of it measured.
    lines = (out / "cells.jsonl").read_text().splitlines()
    assert len(lines) == len({line[: line.index(",")] for line in lines})


def test_what_has_no_rules_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"`tune` has rules for .*ROME.*, but got 'GRACE'"):
        tune("no/such/model", ["GRACE"], out=str(tmp_path / "out"))
    with pytest.raises(EditError, match="`facts` is expected to be at least 1"):
        tune("no/such/model", ["ROME"], facts=0, out=str(tmp_path / "out"))
    one = EditDataModule(requests=tiny_requests(1))
    with pytest.raises(EditError, match="two facts at least"):
        tune("no/such/model", ["ROME"], one, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
