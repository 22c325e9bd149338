# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Tuning by Lightning's own loop: what it commits, how it resumes, and two processes as one."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

from lightning_edit import CaliNET, EditModule, EditRequest, FullTuning, LocFT, LoRATuning
from lightning_edit.core.errors import EditError, RequestError
from lightning_edit.core.processes import Processes
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.functional.token_weights import token_weights
from lightning_edit.modules.fine_tuning import loop
from lightning_edit.modules.fine_tuning.loop import AnswerLoss
from lightning_edit.modules.fine_tuning.tuning import TuningModule
from tests.modules.helpers import autoregressive, bare_trainer, plain_nll, same, snapshot

CASES = [
    pytest.param(LocFT, {"lr": 1e-2}, id="LocFT"),
    pytest.param(FullTuning, {"lr": 2e-3}, id="FullTuning"),
    pytest.param(LoRATuning, {"lr": 2e-2, "alpha": 16.0}, id="LoRATuning"),
]


def _editor(cls: type[TuningModule], **settings: Any) -> TuningModule:
    return cls.from_model(*trained_tiny_model(), **settings)


def _data(n: int = 6, batch_size: int = 3) -> EditDataModule:
    return EditDataModule(requests=tiny_requests(n), batch_size=batch_size)


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_fit_commits_edits_that_can_be_undone(
    cls: type[TuningModule], settings: dict[str, Any], tmp_path: Path
) -> None:
    editor = _editor(cls, **settings)
    before = snapshot(editor.model)
    trainer = bare_trainer(max_epochs=25)
    trainer.fit(editor, datamodule=_data())
    assert trainer.global_step == 50
    assert autoregressive(editor, tiny_requests(6), "reliability") == 1.0

    names = set(snapshot(editor.model))
    assert names == set(before)
    delta = editor.committed()
    assert delta.provenance.request_ids == tuple(r.id for r in tiny_requests(6))
    assert [row["steps"] for row in editor.history] == [25] * 6
    after = snapshot(editor.model)
    untouched = [name for name in names if torch.equal(before[name], after[name])]
    assert set(delta.changes) == names - set(untouched)
    with editor.base_weights():
        assert same(editor.model, before)
    assert same(editor.model, after)

    delta.save(tmp_path)
    delta.revert_(editor.model)
    assert same(editor.model, before)
    fresh, _ = trained_tiny_model()
    loaded = type(delta).load(tmp_path)
    loaded.apply_(fresh)
    assert same(fresh, after)
    loaded.revert_(fresh)
    assert same(fresh, before)


def test_a_fit_does_not_hold_what_those_before_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LARGE", 0)
    model, tokenizer = trained_tiny_model()
    before: list[weakref.ref[FullTuning]] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            editor = FullTuning.from_model(model, tokenizer, lr=1e-4)
            bare_trainer(max_epochs=1).fit(editor, datamodule=_data())
            assert [other() for other in before] == [None] * len(before)
            before.append(weakref.ref(editor))
            del editor
    finally:
        gc.enable()


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_edit_leaves_the_model_alone(cls: type[TuningModule], settings: dict[str, Any]) -> None:
    editor = _editor(cls, steps=40, **settings)
    before = snapshot(editor.model)
    edit = editor.edit(tiny_requests(2))
    assert same(editor.model, before)
    assert [row["id"] for row in edit.details["requests"]] == [r.id for r in tiny_requests(2)]
    with edit.applied(editor.model):
        assert autoregressive(editor, tiny_requests(2), "reliability") == 1.0
    assert same(editor.model, before)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_resumed_run_ends_where_an_uninterrupted_one_does(
    cls: type[TuningModule], settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = _editor(cls, **settings)
    bare_trainer(max_epochs=3).fit(whole, datamodule=_data())

    # Three batches of two epochs: the checkpoint is from the middle of the second.
    def trainer(**stop: int) -> Trainer:
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        return bare_trainer(callbacks=[keep], enable_checkpointing=True, **stop)

    half = _editor(cls, **settings)
    trainer(max_steps=3).fit(half, datamodule=_data())
    path = tmp_path / "step=3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    trained = {f"model.{name}" for name in whole.edit_optimizer.originals}
    if cls is LoRATuning:
        trained = {n.replace(".weight", f".lora_{x}.default.weight") for n in trained for x in "AB"}
    assert set(checkpoint["state_dict"]) == trained

    rest = _editor(cls, **settings)
    resumed = trainer(max_epochs=3)
    resumed.fit(rest, datamodule=_data(), ckpt_path=path)
    assert resumed.global_step == 6
    assert same(rest.model, snapshot(whole.model))
    ours, theirs = rest.committed(), whole.committed()
    assert ours.provenance.request_ids == theirs.provenance.request_ids
    assert [row["steps"] for row in rest.history] == [3] * 6
    assert all(torch.equal(ours.dense(n), theirs.dense(n)) for n in theirs.changes)


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_checkpoint_is_measured_without_training(
    cls: type[TuningModule], settings: dict[str, Any], tmp_path: Path
) -> None:
    editor = _editor(cls, **settings)
    trainer = bare_trainer(max_epochs=2)
    trainer.fit(editor, datamodule=_data())
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    fresh = _editor(cls, **settings)
    before = snapshot(fresh.model)
    bare_trainer(limit_val_batches=1.0).validate(
        fresh, datamodule=_data(), ckpt_path=tmp_path / "tuned.ckpt", verbose=False
    )
    assert same(fresh.model, snapshot(editor.model))
    assert not same(fresh.model, before)


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_measuring_during_fit_changes_nothing(
    cls: type[TuningModule], settings: dict[str, Any]
) -> None:
    plain, measured = _editor(cls, **settings), _editor(cls, **settings)
    bare_trainer(max_epochs=2).fit(plain, datamodule=_data())
    # Measured between the two batches whose gradients are accumulated, too.
    bare_trainer(
        max_epochs=2, limit_val_batches=1.0, val_check_interval=1, num_sanity_val_steps=1
    ).fit(measured, datamodule=_data())
    assert same(measured.model, snapshot(plain.model))
    accumulated, watched = _editor(cls, **settings), _editor(cls, **settings)
    bare_trainer(max_epochs=2, accumulate_grad_batches=2).fit(accumulated, datamodule=_data())
    bare_trainer(
        max_epochs=2, accumulate_grad_batches=2, limit_val_batches=1.0, val_check_interval=1
    ).fit(watched, datamodule=_data())
    assert same(watched.model, snapshot(accumulated.model))
    assert not same(watched.model, snapshot(plain.model))


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_test_protocols_restore_a_tuned_model(
    cls: type[TuningModule], settings: dict[str, Any]
) -> None:
    editor = _editor(cls, steps=2, test_protocol="sequential", **settings)
    bare_trainer(max_epochs=2).fit(editor, datamodule=_data(2))
    tuned = snapshot(editor.model)
    [row] = bare_trainer().test(editor, datamodule=_data(2, 1), verbose=False)
    assert row["test/reliability/teacher_forced"] >= 0
    assert same(editor.model, tuned)


def test_gpt2_and_an_encoder_decoder_are_tuned() -> None:
    for kind in ("gpt2", "t5"):
        for cls in (LocFT, FullTuning, LoRATuning):
            editor = cls.from_model(tiny_model(kind), tiny_tokenizer(), lr=5e-2)
            before = snapshot(editor.model)
            trainer = bare_trainer(max_epochs=15)
            trainer.fit(editor, datamodule=_data(1))
            first = editor.encode(tiny_requests(1))
            with editor.base_weights():
                loss_before = float(editor.batch_loss(first).detach())
            # The head of a random model says little, however loud the hidden state is.
            assert float(editor.batch_loss(first).detach()) < loss_before - 0.3
            editor.committed().revert_(editor.model)
            assert same(editor.model, before)


def test_second_fit_goes_on_with_the_adapter() -> None:
    stateless = functools.partial(SGD, lr=0.5)
    once, twice = (_editor(LoRATuning, optimizer=stateless) for _ in range(2))
    for editor, epochs in ((once, [4]), (twice, [2, 2])):
        for n in epochs:
            bare_trainer(max_epochs=n).fit(editor, datamodule=_data())
    assert same(twice.model, snapshot(once.model))
    assert {c.rank for c in twice.committed().changes.values()} == {8}  # type: ignore[union-attr]


def test_committing_in_the_middle_of_a_fit() -> None:
    from lightning.pytorch import Callback, LightningModule

    class Commit(Callback):
        norms: list[float] = []  # noqa: RUF012

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
        ) -> None:
            assert isinstance(pl_module, EditModule)
            delta = pl_module.committed()
            edit = pl_module.edit(tiny_requests(1))
            assert edit.changes
            fresh, _ = trained_tiny_model()
            delta.apply_(fresh)
            self.norms.append(delta.norm())

    for cls in (LocFT, LoRATuning):
        plain, watched = _editor(cls, lr=1e-2, steps=1), _editor(cls, lr=1e-2, steps=1)
        bare_trainer(max_epochs=2).fit(plain, datamodule=_data())
        commit = Commit()
        commit.norms = []
        bare_trainer(max_epochs=2, callbacks=[commit]).fit(watched, datamodule=_data())
        assert len(commit.norms) == 4
        assert commit.norms == sorted(commit.norms)
        for name, weight in snapshot(plain.model).items():
            torch.testing.assert_close(watched.model.get_parameter(name), weight)


def test_first_step_is_that_of_plain_pytorch() -> None:
    requests = tiny_requests(4)
    for per_sequence in (False, True):
        editor = _editor(FullTuning, optimizer=functools.partial(SGD, lr=0.1))
        editor.loss = AnswerLoss(per_sequence=per_sequence)
        data = _data(4, batch_size=4)
        bare_trainer(max_epochs=1, gradient_clip_val=0.5).fit(editor, datamodule=data)
        model, _ = trained_tiny_model()
        rows = [
            plain_nll(
                model, editor.tokens.prompt(r.prompt), editor.tokens.target(r.prompt, r.target_new)
            )
            for r in requests
        ]
        assert len({len(row) for row in rows}) > 1
        means = torch.stack([torch.stack(row).mean() for row in rows])
        tokens = torch.stack([nll for row in rows for nll in row])
        loss = means.mean() if per_sequence else tokens.mean()
        optimizer = SGD(model.parameters(), lr=0.1)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        for name, weight in snapshot(model).items():
            torch.testing.assert_close(editor.model.get_parameter(name), weight)


def test_end_token_is_learned() -> None:
    editor = _editor(LocFT)
    batch = editor.encode(tiny_requests(2))
    plain = _editor(LocFT, end_token=False).encode(tiny_requests(2))
    for ended, bare in zip(batch.labels.tolist(), plain.labels.tolist(), strict=True):
        targets = [token for token in bare if token != -100]
        assert [token for token in ended if token != -100] == [*targets, editor.tokens.eos_id]
    t5 = LocFT.from_model(tiny_model("t5"), tiny_tokenizer())
    assert t5.encode(tiny_requests(1)).labels[0].tolist().count(t5.tokens.eos_id) == 1


def test_scheduler_steps_each_epoch() -> None:
    editor = _editor(
        LocFT,
        optimizer=functools.partial(AdamW, lr=1.0),
        lr_scheduler=functools.partial(StepLR, step_size=1, gamma=0.5),
    )
    trainer = bare_trainer(max_epochs=3)
    trainer.fit(editor, datamodule=_data())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125
    assert "optimizer" not in editor.hparams
    assert editor.hparams["layers"] is None


def test_dropout_is_off_unless_asked_for() -> None:
    modes: list[bool] = []

    def note(module: Any, _: object, __: object) -> None:
        if torch.is_grad_enabled():  # else what it came to is measured
            modes.append(module.training)

    for train_mode in (False, True):
        model, tokenizer = trained_tiny_model()
        model.model.norm.register_forward_hook(note)
        editor = LocFT.from_model(model.train(), tokenizer, train_mode=train_mode)
        bare_trainer(max_steps=1).fit(editor, datamodule=_data())
        assert model.training  # as it came
    assert modes == [False, True]


def test_contradicting_requests_are_refused() -> None:
    editor = _editor(LocFT)
    requests = [EditRequest("A b is", "b", "one"), EditRequest("A b is", "b", "two")]
    loader: Any = torch.utils.data.DataLoader(requests, batch_size=2, collate_fn=list)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="two"):
        bare_trainer(max_epochs=1).fit(editor, loader, loader)


def test_layers_choose_the_parameters() -> None:
    editor = _editor(FullTuning, layers=[-1])
    assert all(name.startswith("model.layers.3.") for name in editor.edit_optimizer.originals)
    assert len(editor.edit_optimizer.originals) == 9
    with pytest.raises(ValueError, match="Layer 7 does not exist"):
        _editor(LocFT, layers=[7])
    with pytest.raises(ValueError, match="`steps`"):
        LocFT(steps=0)


def test_shares_of_a_batch_add_up() -> None:
    editor = _editor(FullTuning)
    batch = editor.encode(tiny_requests(3))
    whole = editor.batch_loss(batch)
    for replicas in (2, 4):  # with four, one has no row
        shares = [editor.batch_loss(batch, Processes(rank, replicas)) for rank in range(replicas)]
        torch.testing.assert_close(torch.stack(shares).mean(), whole)
        assert all(share.requires_grad for share in shares)


def test_token_weights_add_up_to_one() -> None:
    mask = torch.rand(5, 7) > 0.5
    mask[:, 0] = True
    values = torch.rand(5, 7)
    total: Tensor = (token_weights(mask) * values).sum()
    torch.testing.assert_close(total, values[mask].mean())
    rows = torch.stack([values[b][mask[b]].mean() for b in range(5)])
    torch.testing.assert_close((token_weights(mask, per_sequence=True) * values).sum(), rows.mean())


@pytest.mark.real
def test_goldens_of_full_and_lora_tuning(goldens: Path, default_model: tuple[Any, Any]) -> None:
    """Stages 1 and 4 of the reference run: θ is the base tuned on old facts, then LoRA on θ."""
    import json
    import math

    inputs = json.loads((goldens / "f_learning" / "inputs.json").read_text())
    wanted = json.loads((goldens / "f_learning" / "outputs.json").read_text())
    requests = [EditRequest(prompt, prompt, target) for prompt, target in inputs["old"]]
    losses: list[float] = []

    def fit(editor: TuningModule, epochs: int) -> None:
        from lightning.pytorch import Callback

        class Losses(Callback):
            def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
                losses.append(float(args[0].callback_metrics["loss"]))

        data = EditDataModule(requests=requests, batch_size=2)
        bare_trainer(max_epochs=epochs, callbacks=[Losses()]).fit(editor, datamodule=data)

    model, tokenizer = default_model
    full = FullTuning.from_model(
        model, tokenizer, optimizer=functools.partial(AdamW, lr=5e-5, weight_decay=0.0, fused=True)
    )
    try:
        fit(full, 3)
        assert losses == pytest.approx(wanted["original_model_train_losses"], rel=2e-3)
        norms = full.delta.norms()
        for name, norm in wanted["original_minus_base"]["selected"].items():
            assert norms[name] == pytest.approx(norm, rel=2e-3)

        lora = LoRATuning.from_model(
            model,
            tokenizer,
            alpha=16.0,
            optimizer=functools.partial(AdamW, lr=1e-3, weight_decay=0.0),
        )
        for site, layer in zip(lora.adapter.sites, lora.adapter.layers, strict=True):
            a_RI = layer.lora_A["default"].weight
            k = torch.arange(a_RI.numel(), dtype=torch.float64).view_as(a_RI)
            shift = 1.3 * site.layer + (2.1 if "v_proj" in site.name else 0.0)
            a_RI.data.copy_(torch.sin(0.37 * k + shift) / math.sqrt(a_RI.shape[1]))
        losses.clear()
        fit(lora, 1)
        reference = wanted["LoRA_task_vector"]
        assert losses == pytest.approx(reference["train_losses"], rel=2e-3)
        assert lora.delta.norm() == pytest.approx(reference["total"], rel=2e-3)
        norms = lora.delta.norms()
        for name, norm in reference["selected"].items():
            assert norms[name] == pytest.approx(norm, rel=2e-3)
        for name, entries in reference["first8"].items():
            scale = norms[name] / math.sqrt(lora.delta.dense(name).numel())
            found = lora.delta.dense(name).flatten()[:8].tolist()
            assert found == pytest.approx(entries, abs=2e-2 * scale)
        lora.committed().revert_(model)
    finally:
        with torch.no_grad():
            for name, original in full.edit_optimizer.originals.items():
                model.get_parameter(name).copy_(original)


def test_adam_is_the_default() -> None:
    optimizer = _editor(LocFT, lr=3e-4).configure_optimizers()
    assert type(optimizer) is Adam
    assert optimizer.defaults["lr"] == 3e-4
    assert optimizer.defaults["weight_decay"] == 0


@pytest.mark.parametrize("cls", [FullTuning, LocFT, LoRATuning, CaliNET])
@pytest.mark.parametrize("source", ["lr", "optimizer"])
def test_a_learning_rate_that_is_not_finite_is_refused_before_anything_is_trained(
    cls: Any, source: str
) -> None:
    model, tokenizer = trained_tiny_model()
    before = snapshot(model)
    rates: dict[str, Any] = {
        "lr": {"lr": float("inf")},
        "optimizer": {"optimizer": functools.partial(SGD, lr=float("inf"))},
    }
    editor = cls.from_model(model, tokenizer, layers=[2], **rates[source])
    requests = tiny_requests(1)
    for act in (
        lambda: bare_trainer(max_epochs=1).fit(editor, EditDataModule(requests=requests)),
        lambda: editor.edit(requests),
    ):
        with pytest.raises(EditError, match=r"`lr` of .* is expected to be finite, but got inf"):
            act()
    assert same(model, before)
