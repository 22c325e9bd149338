# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Causal tracing in any Trainer, before it changes anything."""

from __future__ import annotations

import builtins
import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_edit import CausalTracing, EditRequest, FineTune, PromptTokenizer
from lightning_edit.core.errors import EditError
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.tracing.causal_tracing import TracingResult, TracingSettings, trace_facts
from lightning_edit.tracing.restoration import KINDS
from tests.callbacks.foreign import data_of, foreign, quiet_trainer, weights_of
from tests.modules.helpers import bare_trainer
from tests.processes import program, run_pair
from tests.runs import TinyWorld, run_here

FILES = {"causal_tracing.json", "causal_tracing.png"}
FEW: dict[str, Any] = {"samples": 2, "window": 2, "count": 2}


def editor_of() -> FineTune:
    model, tokenizer = trained_tiny_model()
    return FineTune.from_model(model, tokenizer, layers=[2], steps=3)


def assert_same(found: TracingResult | None, wanted: TracingResult) -> None:
    assert found is not None
    assert [fact.id for fact in found.facts] == [fact.id for fact in wanted.facts]
    for one, other in zip(found.facts, wanted.facts, strict=True):
        for kind in KINDS:
            torch.testing.assert_close(one.scores[kind], other.scores[kind], rtol=0, atol=1e-6)


@functools.cache
def wanted_of(n: int, samples: int = 2, window: int = 2) -> TracingResult:
    """Traces of the unedited model, without a Trainer."""
    model, tokenizer = trained_tiny_model()
    settings = TracingSettings(samples=samples, window=window)
    return trace_facts(model, PromptTokenizer(tokenizer), tiny_requests(n), settings)


@pytest.mark.parametrize("kind", ["foreign", "editor"])
def test_a_fit_is_traced_before_its_first_step(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module: LightningModule = foreign() if kind == "foreign" else editor_of()
    tracing = CausalTracing(**FEW)
    trainer = bare_trainer(max_epochs=1, callbacks=[tracing], default_root_dir=tmp_path)
    modes = {name: part.training for name, part in module.named_modules()}
    with caplog.at_level(logging.INFO):
        trainer.fit(module, datamodule=data_of(n=3))
    assert_same(tracing.result, wanted_of(3))
    if kind == "foreign":
        assert modes == {name: part.training for name, part in module.named_modules()}
    saved = json.loads((tmp_path / "causal_tracing.json").read_text(encoding="utf-8"))
    assert saved["settings"]["samples"] == 2
    assert saved["unknown"] == []
    assert len(saved["facts"]) == 3
    fact = wanted_of(3).facts[0]
    assert saved["facts"][0]["tokens"] == list(fact.tokens)
    scores = torch.tensor(saved["facts"][0]["scores"]["mlp"])
    torch.testing.assert_close(scores, fact.scores["mlp"], rtol=0, atol=1e-5)
    assert f"Layers to try  {saved['proposed_layers']}" in caplog.text
    assert "3 of 3 facts known" in caplog.text
    effects = torch.stack(
        [f.indirect_effect("mlp")[f.subject_range[1] - 1] for f in wanted_of(3).facts]
    )
    peak = f"{float(effects.mean(0).max()):+.3f} at the last subject token"
    assert f"MLPs          {peak}, layer {int(effects.mean(0).argmax())}" in caplog.text


def test_validate_traces_the_model_as_it_stands(tmp_path: Path) -> None:
    editor = editor_of()
    trainer = bare_trainer(max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(editor, datamodule=data_of(n=1))
    before = weights_of(editor.model)
    tracing = CausalTracing(**FEW, dirpath=str(tmp_path / "own"))
    trainer = bare_trainer(
        callbacks=[tracing], default_root_dir=tmp_path, limit_val_batches=1, inference_mode=False
    )
    trainer.validate(editor, datamodule=data_of(n=1), verbose=False)
    assert all(torch.equal(p, before[n]) for n, p in editor.model.named_parameters())
    assert {path.name for path in (tmp_path / "own").iterdir()} == FILES
    wanted = trace_facts(
        editor.model, editor.tokens, tiny_requests(1), TracingSettings(samples=2, window=2)
    )
    assert_same(tracing.result, wanted)


def test_validation_within_a_fit_does_not_trace_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing = CausalTracing(**FEW)
    calls = []
    monkeypatch.setattr(CausalTracing, "_trace", lambda *_: calls.append(1))
    trainer = quiet_trainer(tracing, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(foreign(), datamodule=data_of(n=2))
    assert calls == [1]


def test_a_resumed_fit_is_not_traced_again(tmp_path: Path) -> None:
    module = editor_of()
    first = bare_trainer(max_epochs=1, default_root_dir=tmp_path)
    first.fit(module, datamodule=data_of(n=2))
    first.save_checkpoint(tmp_path / "last.ckpt")
    tracing = CausalTracing(**FEW)
    again = bare_trainer(max_epochs=2, callbacks=[tracing], default_root_dir=tmp_path)
    again.fit(
        editor_of(), datamodule=data_of(n=3), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert again.global_step > first.global_step
    assert tracing.result is None
    assert not (tmp_path / "causal_tracing.json").exists()


def test_only_the_first_requests_are_traced_and_own_ones_can_be_given(tmp_path: Path) -> None:
    tracing = CausalTracing(tiny_requests(3), limit=2, **FEW)
    trainer = quiet_trainer(tracing, default_root_dir=tmp_path)
    trainer.fit(foreign(), datamodule=data_of(n=1))
    assert tracing.result is not None
    assert [fact.id for fact in tracing.result.facts] == [r.id for r in tiny_requests(2)]


def test_the_precision_is_the_trainers(tmp_path: Path) -> None:
    tracing = CausalTracing(**FEW)
    trainer = quiet_trainer(tracing, default_root_dir=tmp_path, precision="bf16-mixed")
    trainer.fit(foreign(), datamodule=data_of(n=1))
    assert tracing.result is not None
    found, exact = tracing.result.facts[0], wanted_of(1).facts[0]
    assert found.high != exact.high
    assert found.high == pytest.approx(exact.high, abs=0.05)


def test_unknown_facts_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fact = tiny_requests(1)[0]
    wrong = EditRequest(fact.prompt, fact.subject, "Dorin", "Kettleby", id="wrong")
    trainer = quiet_trainer(CausalTracing(**FEW), default_root_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        trainer.fit(foreign(), datamodule=EditDataModule(requests=[wrong]))
    assert "0 of 1 facts known; give some whose `target_old` the model says" in caplog.text
    saved = json.loads((tmp_path / "causal_tracing.json").read_text(encoding="utf-8"))
    assert (saved["facts"], saved["unknown"], saved["proposed_layers"]) == ([], ["wrong"], [])
    assert not (tmp_path / "causal_tracing.png").exists()


def test_without_matplotlib_there_is_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    trainer = quiet_trainer(CausalTracing(**FEW), default_root_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        trainer.fit(foreign(), datamodule=data_of(n=1))
    assert {path.name for path in tmp_path.iterdir()} == {"causal_tracing.json"}
    assert "pip install 'lightning-edit[plot]'" in caplog.text


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    module = foreign()
    del module.tokenizer
    trainer = quiet_trainer(CausalTracing(**FEW), default_root_dir=tmp_path)
    with pytest.raises(EditError, match="CausalTracing needs the tokenizer of Foreign"):
        trainer.fit(module, datamodule=data_of(n=1))
    loader: Any = torch.utils.data.DataLoader(tiny_requests(1), collate_fn=list)  # type: ignore[arg-type]
    trainer = quiet_trainer(CausalTracing(**FEW), default_root_dir=tmp_path)
    with pytest.raises(EditError, match="CausalTracing has nothing to ask"):
        trainer.fit(foreign(), train_dataloaders=loader, val_dataloaders=loader)
    assert not list(tmp_path.iterdir())


def test_the_command_line_traces(tmp_path: Path) -> None:
    world = TinyWorld(tmp_path, n=2)
    run = tmp_path / "run"
    words = ["-c", "trainer/trace", "--trainer.callbacks.samples=2"]
    assert run_here(world.arguments(run, *words, verb="validate")) == 0
    assert {path.name for path in run.iterdir()} >= FILES
    saved = json.loads((run / "causal_tracing.json").read_text(encoding="utf-8"))
    assert saved["settings"]["samples"] == 2
    assert [fact["id"] for fact in saved["facts"]] == [r.id for r in tiny_requests(2)]


def test_two_processes_share_the_facts_and_write_the_same_once(tmp_path: Path) -> None:
    world = TinyWorld(tmp_path, n=3)
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["-c", "trainer/trace", "--trainer.callbacks.samples=2"]
    assert run_here(world.arguments(one, *words, verb="validate")) == 0
    words += ["-c", "trainer/ddp"]
    ran = run_pair(program, world.arguments(two, *words, verb="validate"))
    # The pictures and the report, by the first process alone.
    assert [process.stderr.count("Saved  ") for process in ran] == [2, 0]
    texts = [(run / "causal_tracing.json").read_text(encoding="utf-8") for run in (one, two)]
    first, second = map(json.loads, texts)
    assert [fact["id"] for fact in second["facts"]] == [r.id for r in tiny_requests(3)]
    for a, b in zip(first.pop("facts"), second.pop("facts"), strict=True):
        for kind in KINDS:
            torch.testing.assert_close(
                torch.tensor(b["scores"][kind]), torch.tensor(a["scores"][kind]), rtol=0, atol=2e-6
            )
    assert second["settings"] == first["settings"]
    assert second["proposed_layers"] == first["proposed_layers"]
