# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What every editor that is trained keeps to, whatever its method."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_edit import EditModule, EditRequest, TrainedEditor, WeightDelta
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import ArtifactError, EditError, RequestError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.data import EditDataModule, HeldOut
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.modules.meta_learning.hypernetwork import HyperEditModule
from tests import zoo
from tests.contract.enumeration import HYPERNETWORKS, LEARNERS, quick, quick_editor
from tests.modules.helpers import bare_trainer, same, snapshot

Trained = Callable[[Any], tuple[Any, Path]]
ONE = EditRequest("People in {} speak", "Velmora", "Ostrish")


@pytest.fixture(params=LEARNERS)
def learner(request: pytest.FixtureRequest) -> Any:
    return LEARNERS[request.param]


@pytest.fixture(params=HYPERNETWORKS)
def cls(request: pytest.FixtureRequest) -> type[HyperEditModule]:
    return HYPERNETWORKS[request.param]


def data_of(n: int = 8, batch_size: int = 2) -> HeldOut:
    requests = tiny_requests(n + 3)
    return HeldOut(
        EditDataModule(requests=requests[:n], batch_size=batch_size),
        EditDataModule(requests=requests[n:], eval_batch_size=2),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An editor of the tiny model after four steps, whose model nobody edits, and a checkpoint."""

    @functools.cache
    def of(cls: Any) -> tuple[Any, Path]:
        editor, checkpoint = quick_editor(cls), tmp_path_factory.mktemp("trained") / "editor.ckpt"
        trainer = bare_trainer(max_epochs=1)
        trainer.fit(editor, data_of())
        trainer.save_checkpoint(checkpoint)
        return editor, checkpoint

    return of


def tensors_of(editor: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in editor.network.state_dict().items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_training_moves_the_network_and_leaves_the_model_alone(
    learner: Any,
) -> None:
    editor = quick_editor(learner)
    model, before = snapshot(editor.model), tensors_of(editor)
    trainer = bare_trainer(max_epochs=1, limit_val_batches=1.0, inference_mode=True)
    trainer.fit(editor, data_of())
    assert trainer.global_step == 4
    assert same(editor.model, model)
    assert all(p.requires_grad and p.grad is None for p in editor.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in editor.model.modules())
    after = tensors_of(editor)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert editor.skipped == 0
    assert trainer.callback_metrics.keys() >= {
        *learner.figures,
        *(f"val/{name}" for name in learner.figures),
        "val/reliability/teacher_forced",
        "val/generality/teacher_forced",
        "val/locality/teacher_forced",
    }


def test_numbers_it_begins_with_come_from_its_seed(learner: Any) -> None:
    torch.manual_seed(1)
    one = tensors_of(quick_editor(learner))
    torch.manual_seed(2)
    assert_equal(tensors_of(quick_editor(learner)), one)
    other = tensors_of(quick_editor(learner, seed=1))
    assert any(not torch.equal(other[name], tensor) for name, tensor in one.items())


def test_an_editor_that_was_never_trained_edits_nothing_or_says_so(
    learner: Any,
) -> None:
    editor = quick_editor(learner)
    if editor.is_ready:
        assert math.isfinite(editor.edit(ONE).norm())
        return
    kept = snapshot(editor.model)
    with pytest.raises(EditError, match="never trained"):
        editor.edit(ONE)
    with pytest.raises(EditError, match="never trained"):
        bare_trainer(limit_val_batches=1.0).validate(editor, data_of(), verbose=False)
    assert same(editor.model, kept)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_edits_are_low_rank_and_exact_on_every_architecture(
    cls: type[HyperEditModule], kind: str
) -> None:
    model = zoo.build(kind)
    kept = snapshot(model)
    editor = cls.from_model(model, tiny_tokenizer(), layers=[1, 2], **quick(cls))
    bare_trainer(max_epochs=1).fit(editor, data_of(4))
    edit = editor.edit(ONE)
    if kind in zoo.ENCODER_DECODERS:
        assert {"encoder", "decoder"} <= {p for n in edit.changes for p in n.split(".")}
    assert same(model, kept)
    logits = {}
    target = editor.tokens.target(ONE.prompt, ONE.target_new)
    ids = torch.tensor([editor.tokens.prompt(ONE.prompt)])
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if editor.tokens.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, *target[:-1]]])
    logits["base"] = model(**inputs).logits
    edit.apply_(model)
    logits["edited"] = model(**inputs).logits
    edit.revert_(model)
    assert same(model, kept)
    assert not torch.equal(logits["base"], logits["edited"])
    # What was measured beside the weights is what the written weights say.
    [row] = edit.details["requests"]
    with edit.applied(model):
        found = editor.evaluator.evaluate([ONE], editor.evaluator.baseline([ONE]))
    assert row["p_target"] == pytest.approx(
        math.exp(-float(found.probes[0].nll_new or 0)), rel=1e-3
    )


def test_a_checkpoint_holds_the_network_alone(learner: Any, trained: Trained) -> None:
    editor, checkpoint = trained(learner)
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["state_dict"].keys() == {f"network.{n}" for n in editor.network.state_dict()}
    assert saved["lightning_edit"]["editor"]["method"] == learner.__name__
    json.dumps(saved["lightning_edit"]["editor"])


def test_a_trained_editor_edits_out_of_its_checkpoint(
    cls: type[HyperEditModule], trained: Trained, tmp_path: Path
) -> None:
    editor, checkpoint = trained(cls)
    wanted = editor.edit(ONE)
    loaded = quick_editor(cls)
    loaded.load_editor(checkpoint)
    applied = quick_editor(TrainedEditor, checkpoint=str(checkpoint))
    assert type(applied.trained) is cls
    assert not any(p.requires_grad for p in applied.network.parameters())
    for one in (loaded, applied):
        edit = one.edit(ONE)
        assert all(torch.equal(edit.dense(n), wanted.dense(n)) for n in wanted.changes)
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(applied, EditDataModule(requests=[ONE]))
    assert trainer.global_step == 1
    committed = applied.committed()
    for name in wanted.changes:
        assert torch.equal(committed.dense(name), wanted.dense(name))
    committed.save(tmp_path / "delta")
    WeightDelta.load(tmp_path / "delta").revert_(applied.model)
    assert weight_hash(applied.model) == applied.base.sha256


def test_edits_one_after_another_are_of_the_edited_model(
    cls: type[HyperEditModule], trained: Trained
) -> None:
    editor = quick_editor(TrainedEditor, checkpoint=str(trained(cls)[1]))
    first, second = tiny_requests(2)
    alone = editor.edit(second)
    bare_trainer(max_epochs=1).fit(editor, EditDataModule(requests=[first]))
    after = editor.edit(second)
    name = next(iter(alone.changes))
    assert not torch.equal(alone.dense(name), after.dense(name))


def test_a_resumed_training_ends_as_one_that_was_not_interrupted(
    learner: Any, tmp_path: Path
) -> None:
    def saving(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=1, save_top_k=0)

    settings: dict[str, Any] = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "enable_checkpointing": True,
        "max_epochs": 2,
    }
    whole = quick_editor(learner)
    bare_trainer(**settings, callbacks=[saving("whole")]).fit(whole, data_of())
    stopped = bare_trainer(**settings, max_steps=1, callbacks=[saving("parts")])
    stopped.fit(quick_editor(learner), data_of())
    torch.manual_seed(1)
    resumed = quick_editor(learner)
    trainer = bare_trainer(**settings, callbacks=[saving("parts")])
    trainer.fit(resumed, data_of(), ckpt_path=tmp_path / "parts/last.ckpt", weights_only=True)
    assert trainer.global_step == 4
    assert_equal(tensors_of(resumed), tensors_of(whole))


def test_early_stopping_and_loggers_work_as_ever(learner: Any, tmp_path: Path) -> None:
    trainer = bare_trainer(
        max_epochs=3,
        limit_val_batches=1.0,
        num_sanity_val_steps=2,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path, "", ""),
        callbacks=[EarlyStopping("val/loss", patience=1, mode="max", stopping_threshold=-1.0)],
    )
    trainer.fit(quick_editor(learner), data_of(4))
    assert trainer.current_epoch == 1
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {*learner.figures, "skipped", "val/loss"} <= set(header)


def test_mixed_precision_trains_too(learner: Any) -> None:
    editor = quick_editor(learner)
    bare_trainer(max_epochs=1, precision="bf16-mixed").fit(editor, data_of())
    assert editor.skipped == 0
    assert editor.edit(ONE).norm() < float("inf")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_not_finite_is_left_out_counted_and_told(learner: Any, accumulate: int) -> None:
    editor = quick_editor(learner)
    usual = editor.objective.token_loss
    calls = 0

    def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        losses: Tensor = usual(logits, targets)
        return losses * float("nan") if calls == 2 else losses

    editor.objective.token_loss = token_loss
    trainer = bare_trainer(max_epochs=1, accumulate_grad_batches=accumulate)
    with pytest.warns(UserWarning, match="1 steps were left out because"):
        trainer.fit(editor, data_of())
    assert editor.skipped == 1
    assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(editor).values())


def test_requests_that_cannot_teach_are_refused_by_name(learner: Any) -> None:
    editor = quick_editor(learner, train_on="rephrase")
    request = tiny_requests(1)[0]
    for lacking, message in (
        (replace(request, rephrases=()), "has no rephrase.*train_on='prompt'"),
        (replace(request, locality=()), "has no locality probe"),
    ):
        with pytest.raises(RequestError, match=f"'{request.id}' {message}"):
            bare_trainer(max_epochs=1).fit(editor, EditDataModule(requests=[lacking]))


def test_a_checkpoint_of_something_else_is_refused(
    cls: type[HyperEditModule], trained: Trained, tmp_path: Path
) -> None:
    checkpoint = trained(cls)[1]
    other, tokenizer = trained_tiny_model()
    with torch.no_grad():
        other.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.01)
    with pytest.raises(ArtifactError, match="another model, or it has been edited already"):
        TrainedEditor.from_model(other, tokenizer, checkpoint=str(checkpoint))
    allowed = TrainedEditor.from_model(other, tokenizer, checkpoint=str(checkpoint), any_base=True)
    assert allowed.edit(ONE).norm() > 0
    with pytest.raises(ArtifactError, match="was trained to edit"):
        quick_editor(cls, layers=[0]).load_editor(checkpoint)
    with pytest.raises(ArtifactError, match="There is no checkpoint"):
        quick_editor(cls).load_editor(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "none.ckpt")
    with pytest.raises(ArtifactError, match="holds no trained editor"):
        quick_editor(cls).load_editor(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="Leave them out"):
        TrainedEditor(str(checkpoint), layers=[1])


def test_the_other_verbs_edit_and_take_it_out_again(learner: Any, trained: Trained) -> None:
    editor: EditModule = trained(learner)[0]
    kept = snapshot(editor.model)
    trainer = bare_trainer(limit_val_batches=1.0)
    data = EditDataModule(requests=tiny_requests(2), eval_batch_size=1)
    [validated] = trainer.validate(editor, datamodule=data, verbose=False)
    assert validated.keys() >= {"val/loss", "val/reliability/autoregressive"}
    [tested] = trainer.test(editor, datamodule=data, verbose=False)
    for name in ("reliability", "generality", "locality"):
        for reading in ("teacher_forced", "autoregressive"):
            key = f"{name}/{reading}"
            assert validated[f"val/{key}"] == pytest.approx(tested[f"test/{key}"])
    rows: Any = trainer.predict(editor, datamodule=data)
    assert [row["before"] for batch in rows for row in batch]
    assert same(editor.model, kept)


def test_changes_are_factors_where_they_are_small(
    cls: type[HyperEditModule], trained: Trained
) -> None:
    editor = trained(cls)[0]
    edit = editor.edit(ONE)
    ranks = [c.rank for c in edit.changes.values() if isinstance(c, LowRank)]
    longest = len(editor.tokens.prompt(ONE.prompt)) + len(
        editor.tokens.target(ONE.prompt, ONE.target_new)
    )
    assert all(rank <= longest for rank in ranks)
