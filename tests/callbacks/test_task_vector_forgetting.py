# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_edit import (
    ROME,
    EditDataModule,
    EditError,
    EditRequest,
    FullTuning,
    OldThenNew,
    SaveTaskVector,
    TaskVectorForgetting,
    WeightDelta,
)
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.forgetting.subtract import forget_, load_task_vector, sweep_forgetting
from tests.callbacks.foreign import Foreign, data_of, fit, foreign, quiet_trainer, weights_of

RATE = 0.3

pytestmark = [
    # peft 0.21 asks transformers for a name that is to go in its next major version.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # Interrupted runs save with a ModelCheckpoint that their continuations have no use for.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task vector of one more epoch on the old knowledge."""
    folder = tmp_path_factory.mktemp("vectors") / "old"
    fit(foreign(), data_of(old=True), SaveTaskVector(str(folder)))
    return folder


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def _close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


class _Weights(Callback):
    """Copies the weights at a hook."""

    def __init__(self, hook: str) -> None:
        self.seen: list[dict[str, Tensor]] = []
        setattr(self, hook, self._look)

    def _look(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append(weights_of(pl_module))


# -- the vector -------------------------------------------------------------------------------


def test_saved_vector_is_what_the_run_changed(vector: Path) -> None:
    module = foreign()
    before = weights_of(module.net)
    after = weights_of(fit(module, data_of(old=True)).net)
    saved = WeightDelta.load(vector)
    assert set(saved.changes) == set(before)
    for name in before:
        assert torch.equal(saved.dense(name), after[name] - before[name])
    assert saved.provenance.settings == {"epochs": 1, "steps": 2}
    model = trained_tiny_model()[0]
    saved.apply_(model)  # compares the model's hash with the recorded one
    _close(weights_of(model), after)


def test_rate_zero_is_a_plain_fit(vector: Path) -> None:
    plain = fit(foreign(), data_of(), max_epochs=2)
    forgetting = fit(foreign(), data_of(), TaskVectorForgetting(str(vector), 0.0), max_epochs=2)
    _equal(weights_of(plain), weights_of(forgetting))
    assert plain.losses == forgetting.losses


def test_forgetting_happens_once_before_the_first_step(vector: Path) -> None:
    start = weights_of(foreign().net)
    look = _Weights("on_train_batch_start")
    module = fit(foreign(), data_of(), TaskVectorForgetting(str(vector), RATE), look)
    tau = WeightDelta.load(vector)
    expected = {f"net.{n}": start[n].double() - RATE * tau.dense(n).double() for n in start}
    _close({n: t.double() for n, t in look.seen[0].items()}, expected)
    by_hand = foreign()
    forget_(by_hand.net, tau, RATE)
    fit(by_hand, data_of())
    _equal(weights_of(by_hand), weights_of(module))


def test_forgetting_forgets(vector: Path) -> None:
    module, old = foreign(), data_of(old=True).requests
    with torch.no_grad():
        before = float(module.loss(old))
        forget_(module.net, load_task_vector(vector, module.net), 3.0)
        assert float(module.loss(old)) > before + 0.1


def test_there_and_back_restores(vector: Path) -> None:
    model = trained_tiny_model()[0]
    start = weights_of(model)
    tau = load_task_vector(vector, model)
    forget_(model, tau, RATE)
    assert not torch.equal(weights_of(model)["model.norm.weight"], start["model.norm.weight"])
    forget_(model, tau, -RATE)
    _close(weights_of(model), start)


def test_sweep_measures_each_rate_and_restores(vector: Path) -> None:
    module, old = foreign(), data_of(old=True).requests
    start = weights_of(module)
    tau = load_task_vector(vector, module.net)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        return {"nll": float(module.loss(old))}

    rows = sweep_forgetting(module.net, tau, [0.0, 1.0, 3.0], evaluate)
    _equal(weights_of(module), start)
    for row in rows:
        alone = foreign()
        forget_(alone.net, tau, row["rate"])
        with torch.no_grad():
            assert row["nll"] == float(alone.loss(old))
    assert rows[0]["nll"] < rows[1]["nll"] < rows[2]["nll"]

    def fail() -> dict[str, float]:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        sweep_forgetting(module.net, tau, [1.0], fail)
    _equal(weights_of(module), start)


# -- learning the vector first ------------------------------------------------------------------


def test_first_phase_equals_the_saved_vector(vector: Path, tmp_path: Path) -> None:
    saved = fit(foreign(), data_of(), TaskVectorForgetting(str(vector), RATE), max_epochs=2)
    forgetting = TaskVectorForgetting(
        rate=RATE, forget_epochs=1, save_task_vector=str(tmp_path / "old")
    )
    phases = fit(foreign(), OldThenNew(data_of(), 1), forgetting, max_epochs=3)
    # Two steps learn the old knowledge, then moments begin anew as in a run of its own.
    assert phases.losses[2:] == saved.losses
    _equal(weights_of(phases), weights_of(saved))
    learned, given = WeightDelta.load(tmp_path / "old"), WeightDelta.load(vector)
    _equal(
        {n: learned.dense(n) for n in learned.changes}, {n: given.dense(n) for n in given.changes}
    )
    assert learned.provenance.base == given.provenance.base


def test_old_answers_are_not_said_to_be_missing() -> None:
    editor = FullTuning.from_model(*trained_tiny_model(), lr=1e-9)
    forgetting = TaskVectorForgetting(rate=0.0, forget_epochs=1)
    trainer = quiet_trainer(forgetting, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="4 of 4 edits did not take"):
        trainer.fit(editor, OldThenNew(data_of(), 1))


def test_two_data_modules_serve_the_phases_as_well(vector: Path) -> None:
    data = OldThenNew(data_of(), 1, old=data_of(old=True))
    both = fit(foreign(), data, TaskVectorForgetting(rate=RATE, forget_epochs=1), max_epochs=2)
    one = OldThenNew(data_of(), 1)
    expected = fit(foreign(), one, TaskVectorForgetting(rate=RATE, forget_epochs=1), max_epochs=2)
    _equal(weights_of(both), weights_of(expected))


# -- resuming -----------------------------------------------------------------------------------


def _resumed(
    make: Callable[[], tuple[Foreign, list[Callback]]],
    data: Callable[[], Any],
    folder: Path,
    step: int,
    epochs: int,
) -> tuple[Foreign, Foreign]:
    """A run without and one with an interruption after a step."""
    folder = folder / "checkpoints"
    keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    module, callbacks = make()
    whole = fit(module, data(), *callbacks, keep, max_epochs=epochs, enable_checkpointing=True)
    path = folder / f"step={step}.ckpt"
    torch.load(path, weights_only=True)
    module, callbacks = make()
    return whole, fit(module, data(), *callbacks, max_epochs=epochs, ckpt_path=path)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resuming_does_not_forget_twice(vector: Path, tmp_path: Path, step: int) -> None:
    whole, resumed = _resumed(
        lambda: (foreign(), [TaskVectorForgetting(str(vector), RATE)]),
        data_of,
        tmp_path,
        step,
        epochs=2,
    )
    _equal(weights_of(whole), weights_of(resumed))


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_first_phase_resumes(tmp_path: Path, step: int) -> None:
    # Step 2 ends the first of two old epochs, 4 the last one, 3 and 5 are within epochs.
    def data() -> OldThenNew:
        new, old = data_of(), data_of(old=True)
        return OldThenNew(new, 2, old=old)

    whole, resumed = _resumed(
        lambda: (foreign(), [TaskVectorForgetting(rate=RATE, forget_epochs=2)]),
        data,
        tmp_path,
        step,
        epochs=4,
    )
    assert whole.losses[step:] == resumed.losses
    _equal(weights_of(whole), weights_of(resumed))


@pytest.mark.parametrize("step", [1, 2])
def test_vector_of_a_resumed_run_is_that_of_the_whole_run(tmp_path: Path, step: int) -> None:
    folders = [tmp_path / "first", tmp_path / "resumed"]
    unused = list(folders)
    _resumed(
        lambda: (foreign(), [SaveTaskVector(str(unused.pop(0)))]),
        lambda: data_of(old=True),
        tmp_path,
        step,
        epochs=2,
    )
    whole, resumed = (WeightDelta.load(folder) for folder in folders)
    _equal(
        {n: whole.dense(n) for n in whole.changes}, {n: resumed.dense(n) for n in resumed.changes}
    )


def test_checkpoints_of_the_second_phase_hold_no_copy(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(
        foreign(),
        OldThenNew(data_of(), 1),
        TaskVectorForgetting(rate=RATE, forget_epochs=1),
        keep,
        max_epochs=2,
        enable_checkpointing=True,
    )
    held = [
        torch.load(tmp_path / f"step={step}.ckpt", weights_only=True).get("TaskVectorForgetting")
        for step in (1, 3)
    ]
    assert set(held[0]["base"]) == set(weights_of(foreign().net))
    assert held[1] is None


def test_a_changed_rate_comes_too_late(vector: Path, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last")
    fit(
        foreign(),
        data_of(),
        TaskVectorForgetting(str(vector), RATE),
        keep,
        enable_checkpointing=True,
    )
    late = TaskVectorForgetting(str(vector), 0.5)
    with pytest.warns(UserWarning, match="forgot at the rate 0.3; `rate` is 0.5 now"):
        fit(foreign(), data_of(), late, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert late.rate == RATE


def test_vector_of_a_run_resumed_without_the_callback_is_doubted(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last")
    fit(foreign(), data_of(), keep, enable_checkpointing=True)
    save = SaveTaskVector(str(tmp_path / "vector"))
    with pytest.warns(UserWarning, match="goes on at step 2 .* without SaveTaskVector"):
        fit(foreign(), data_of(), save, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")


def test_first_phase_needs_its_beginning(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last")
    fit(foreign(), data_of(), keep, enable_checkpointing=True)
    data = OldThenNew(data_of(), 2)
    with pytest.raises(EditError, match=r"goes on at epoch 1 .* without TaskVectorForgetting"):
        fit(
            foreign(),
            data,
            TaskVectorForgetting(forget_epochs=2),
            max_epochs=4,
            ckpt_path=tmp_path / "last.ckpt",
        )


def test_each_new_run_forgets_and_a_continued_one_does_not(vector: Path) -> None:
    forgetting = TaskVectorForgetting(str(vector), RATE)
    first = fit(foreign(), data_of(), forgetting)
    second = fit(foreign(), data_of(), forgetting)
    _equal(weights_of(first), weights_of(second))
    look = _Weights("on_train_start")
    module = foreign()
    trainer = quiet_trainer(forgetting, look, max_epochs=1)
    trainer.fit(module, data_of())
    ended = weights_of(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data_of())
    _equal(look.seen[1], ended)


# -- adapters -----------------------------------------------------------------------------------


def _adapted(kind: str = "llama", seed: int = 0, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = trained_tiny_model()[0] if kind == "llama" else tiny_model("gpt2")
    targets = ["q_proj", "v_proj"] if kind == "llama" else ["c_attn", "c_proj"]
    config = peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 6,
            "target_modules": targets,
            "fan_in_fan_out": kind == "gpt2",
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config)


def _randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


_ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"use_rslora": True}),
    ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}}),
    ("gpt2", {}),
    ("gpt2", {"use_rslora": True}),
]


@pytest.mark.parametrize(("kind", "settings"), _ADAPTERS)
def test_adapter_is_subtracted_as_if_it_had_been_merged(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    adapted = _randomized(_adapted(kind, **settings))
    adapted.save_pretrained(tmp_path)
    model = trained_tiny_model()[0] if kind == "llama" else tiny_model("gpt2")
    start = weights_of(model)
    merged = weights_of(adapted.merge_and_unload())
    tau = load_task_vector(tmp_path, model)
    assert tau.nbytes < sum(t.nbytes for t in start.values()) / 4
    forget_(model, tau, 3.0)
    _close(weights_of(model), {n: start[n] - 3.0 * (merged[n] - start[n]) for n in start}, 1e-5)
    changed = {n for n in start if not torch.equal(start[n], merged[n])}
    assert set(tau.changes) == changed


def test_weights_beneath_another_adapter_are_changed(tmp_path: Path) -> None:
    _randomized(_adapted()).save_pretrained(tmp_path)
    plain, adapted = trained_tiny_model()[0], _adapted(seed=5)
    forget_(plain, load_task_vector(tmp_path, plain), RATE)
    inner = adapted.get_base_model()
    forget_(inner, load_task_vector(tmp_path, inner), RATE)
    _equal(weights_of(plain), weights_of(adapted.unload()))


class _Adapter(Foreign):
    """Keeps only the adapter in its checkpoints."""

    strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        held = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: t for name, t in held.items() if "lora_" in name}


def _adapter_module(seed: int = 0, **settings: Any) -> _Adapter:
    return _Adapter(_adapted(seed=seed, **settings), tiny_tokenizer(), lr=5e-3)


def test_vector_of_a_lora_run_is_that_of_its_adapter(tmp_path: Path) -> None:
    module = _adapter_module()
    fit(module, data_of(old=True), SaveTaskVector(str(tmp_path / "delta")), max_epochs=3)
    module.net.save_pretrained(tmp_path / "adapter")
    model = trained_tiny_model()[0]
    ours = load_task_vector(tmp_path / "delta", model)
    theirs = load_task_vector(tmp_path / "adapter", model)
    assert set(ours.changes) == set(theirs.changes)
    assert ours.norm() > 0.01
    for name in ours.changes:
        torch.testing.assert_close(ours.dense(name), theirs.dense(name))
    assert ours.nbytes == theirs.nbytes


def test_vector_of_a_lora_run_begins_at_the_given_adapter(tmp_path: Path) -> None:
    module = _Adapter(_randomized(_adapted()), tiny_tokenizer(), lr=5e-3)
    before = weights_of(_randomized(_adapted()).merge_and_unload())
    fit(module, data_of(old=True), SaveTaskVector(str(tmp_path)))
    after = weights_of(module.net.merge_and_unload())
    tau = load_task_vector(tmp_path, trained_tiny_model()[0])
    for name in tau.changes:
        torch.testing.assert_close(tau.dense(name), after[name] - before[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_f_learning_lora_resumes_with_slim_checkpoints(tmp_path: Path, step: int) -> None:
    adapter = tmp_path / "adapter"
    first = _adapter_module()
    fit(first, data_of(old=True), max_epochs=3)
    first.net.save_pretrained(adapter)
    whole, resumed = _resumed(
        lambda: (_adapter_module(seed=7), [TaskVectorForgetting(str(adapter), 0.7)]),
        data_of,
        tmp_path,
        step,
        epochs=2,
    )
    _equal(weights_of(whole), weights_of(resumed))
    plain = fit(_adapter_module(seed=7), data_of(), max_epochs=2)
    assert plain.losses != whole.losses


def test_slim_checkpoint_validates_as_it_was_trained(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    _randomized(_adapted()).save_pretrained(adapter)
    module = _adapter_module(seed=7)
    forgetting = TaskVectorForgetting(str(adapter), 0.7)
    trainer = quiet_trainer(forgetting)
    trainer.fit(module, data_of())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    expected = trainer.validate(module, data_of(), verbose=False)
    again = quiet_trainer(TaskVectorForgetting(str(adapter), 0.7))
    found = again.validate(
        _adapter_module(seed=7),
        data_of(),
        ckpt_path=tmp_path / "run.ckpt",
        weights_only=True,
        verbose=False,
    )
    assert found == expected


@pytest.mark.parametrize("step", [1, 2, 3])
def test_adapter_learned_in_the_first_phase(tmp_path: Path, step: int) -> None:
    whole, resumed = _resumed(
        lambda: (_adapter_module(), [TaskVectorForgetting(rate=0.7, forget_epochs=1)]),
        lambda: OldThenNew(data_of(), 1, old=data_of(old=True)),
        tmp_path,
        step,
        epochs=2,
    )
    _equal(weights_of(whole), weights_of(resumed))
    first = _adapter_module()
    fit(first, data_of(old=True))
    first.net.save_pretrained(tmp_path / "adapter")
    second = fit(_adapter_module(), data_of(), TaskVectorForgetting(str(tmp_path / "adapter"), 0.7))
    _close(weights_of(whole), weights_of(second))


# -- warnings -----------------------------------------------------------------------------------


def test_warns_of_a_model_that_does_not_know_the_old_facts(vector: Path) -> None:
    ignorant = Foreign(tiny_model(), tiny_tokenizer())
    start = weights_of(ignorant)
    with pytest.warns(UserWarning, match="does not know what it is to forget.* nats a token"):
        fit(ignorant, data_of(), TaskVectorForgetting(str(vector), 0.0))
    silent = Foreign(tiny_model(), tiny_tokenizer())
    fit(silent, data_of(), TaskVectorForgetting(str(vector), 0.0, old_nll_warning=None))
    _equal(weights_of(ignorant), weights_of(silent))
    assert start.keys() == weights_of(silent).keys()
    assert all(module.training for module in silent.net.modules())
    with pytest.warns(UserWarning, match="does not know"):
        fit(
            Foreign(tiny_model(), tiny_tokenizer()),
            OldThenNew(data_of(), 1),
            TaskVectorForgetting(rate=0.0, forget_epochs=1),
            max_epochs=2,
        )


def test_warns_when_rounding_swallows_the_vector(vector: Path) -> None:
    model = trained_tiny_model()[0].bfloat16()
    tau = load_task_vector(vector, model)
    with pytest.warns(UserWarning, match=r"Only \d+% of what was to be forgotten survives"):
        forget_(model, tau, 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forget_(trained_tiny_model()[0], tau, 0.01)


# -- errors -------------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="both are given"):
        TaskVectorForgetting("folder", forget_epochs=1)
    with pytest.raises(ValueError, match="neither is given"):
        TaskVectorForgetting()
    with pytest.raises(ValueError, match="`rate` is expected to be 0 or more, but got -1"):
        TaskVectorForgetting("folder", rate=-1.0)
    with pytest.raises(ValueError, match="finite"):
        TaskVectorForgetting("folder", rate=float("nan"))
    with pytest.raises(ValueError, match="`forget_epochs`"):
        TaskVectorForgetting(forget_epochs=-1)
    with pytest.raises(ValueError, match="`save_task_vector`"):
        TaskVectorForgetting("folder", save_task_vector="other")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not exist.* `delta_config.json`"):
        fit(foreign(), data_of(), TaskVectorForgetting(str(tmp_path / "none")))
    with pytest.raises(ArtifactError, match="has neither"):
        fit(foreign(), data_of(), TaskVectorForgetting(str(tmp_path)))


def test_vector_of_another_model(vector: Path, tmp_path: Path) -> None:
    other = Foreign(tiny_model("gpt2"), tiny_tokenizer())
    with pytest.raises(ArtifactError, match="which the model does not have"):
        fit(other, data_of(), TaskVectorForgetting(str(vector), old_nll_warning=None))
    module = foreign()
    start = weights_of(module)
    saved = WeightDelta.load(vector)
    name = "model.norm.weight"
    WeightDelta({**saved.changes, name: torch.zeros(3)}).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"of the shape \[3\], but the model stores \[32\]"):
        fit(module, data_of(), TaskVectorForgetting(str(tmp_path)))
    _equal(weights_of(module), start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "a IA3 adapter"),
        ({"use_dora": True}, "variant of LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights too"),
    ],
)
def test_adapters_of_other_kinds(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import json

    _adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=message):
        load_task_vector(tmp_path, trained_tiny_model()[0])


def test_damaged_adapters(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = trained_tiny_model()[0]
    _adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_B" in name)
    save_file({n: t for n, t in tensors.items() if n != first}, file)
    with pytest.raises(ArtifactError, match="lacks the matrix B"):
        load_task_vector(tmp_path, model)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}, file)
    with pytest.raises(ArtifactError, match=r"`base_model.model.lm_head.weight`, but only"):
        load_task_vector(tmp_path, model)
    save_file({n.replace("layers.0", "layers.9"): t for n, t in tensors.items()}, file)
    with pytest.raises(ArtifactError, match=r"layers.9.* which this model does not have"):
        load_task_vector(tmp_path, model)
    file.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_task_vector(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"adapter_config.json` cannot be read"):
        load_task_vector(tmp_path, model)


def test_no_model_and_two_models(vector: Path) -> None:
    class Holder(Foreign):
        def __init__(self) -> None:
            super().__init__(*trained_tiny_model())
            self.judge: nn.Module = tiny_model()

    with pytest.raises(ModelError, match="2 Hugging Face models: `net`, `judge`"):
        fit(Holder(), data_of(), TaskVectorForgetting(str(vector)))
    named = TaskVectorForgetting(str(vector), RATE, model_attribute="net")
    module = Holder()
    fit(module, data_of(), named)
    assert named.done
    _equal(weights_of(module.judge), weights_of(tiny_model()))
    with pytest.raises(ModelError, match="has no such attribute"):
        fit(Holder(), data_of(), TaskVectorForgetting(str(vector), model_attribute="nett"))

    class Empty(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters())

    with pytest.raises(ModelError, match="Empty holds no Hugging Face model"):
        quiet_trainer(TaskVectorForgetting(str(vector))).fit(Empty(), [0])


def test_phases_are_checked() -> None:
    with pytest.raises(EditError, match="`max_epochs` 1, so no epoch is left"):
        fit(foreign(), OldThenNew(data_of(), 1), TaskVectorForgetting(forget_epochs=1))
    with pytest.raises(EditError, match="old knowledge for 2 epochs, but `forget_epochs`"):
        fit(
            foreign(),
            OldThenNew(data_of(), 2),
            TaskVectorForgetting(forget_epochs=1),
            max_epochs=4,
        )


def test_editors_that_write_from_originals_are_refused(vector: Path) -> None:
    editor = ROME.from_model(*trained_tiny_model(), layers=[1])
    with pytest.raises(EditError, match="ROME writes edits as original"):
        quiet_trainer(TaskVectorForgetting(str(vector))).fit(editor, data_of())


def test_nothing_trainable_and_more_than_factors(tmp_path: Path) -> None:
    save = SaveTaskVector(str(tmp_path))
    adapted = _adapter_module(modules_to_save=["model.norm"])
    with pytest.raises(ModelError, match="Beside LoRA factors"):
        fit(adapted, data_of(), save)
    frozen = foreign()
    frozen.net.requires_grad_(False)
    frozen.head = nn.Linear(1, 1)
    with pytest.raises(ModelError, match="no trainable parameter"):
        fit(frozen, data_of(), save)


# -- what is to be kept ------------------------------------------------------------------------


def _retained() -> EditDataModule:
    return EditDataModule(requests=tiny_requests(4)[2:])


def test_what_is_to_be_kept_is_spared(vector: Path) -> None:
    module, data = foreign(), data_of()
    start, tau = weights_of(module.net), WeightDelta.load(vector)
    look = _Weights("on_train_batch_start")
    forgetting = TaskVectorForgetting(str(vector), RATE, retain=_retained(), retain_alpha=2.0)
    fit(module, data, forgetting, look)

    def diagonal(requests: list[EditRequest]) -> dict[str, Tensor]:
        """From gradients of one answer at a time, by the model's own loss."""
        module.net = trained_tiny_model()[0].requires_grad_(True)
        named = dict(module.net.named_parameters())
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
        tokens = PromptTokenizer(module.tokenizer)
        for request in requests:
            target = tokens.target(request.prompt, request.target_new)
            loss = module.loss([request]) * len(target)
            for name, gradient in zip(
                named, torch.autograd.grad(loss, [*named.values()]), strict=True
            ):
                sums[name] += gradient.double().square() / len(requests)
        return sums

    old, kept = diagonal(data.old_requests), diagonal(_retained().requests)
    for name in start:
        s = (old[name] / (old[name] + 2.0 * kept[name])).nan_to_num(0.0)
        wanted = start[name] - RATE * s * tau.dense(name)
        torch.testing.assert_close(look.seen[0][f"net.{name}"].double(), wanted, atol=1e-5, rtol=0)
    assert forgetting.done


def test_nothing_to_be_kept_is_plain_forgetting_where_the_old_answers_are(vector: Path) -> None:
    plain, spared = foreign(), foreign()
    fit(plain, data_of(), TaskVectorForgetting(str(vector), RATE))
    none = TaskVectorForgetting(str(vector), RATE, retain=_retained(), retain_alpha=0.0)
    fit(spared, data_of(), none)
    _close(weights_of(plain), weights_of(spared), 1e-5)


def test_old_knowledge_learned_first_is_spared_as_well() -> None:
    module, look = foreign(), _Weights("on_train_batch_start")
    data = OldThenNew(data_of(), forget_epochs=1)
    forgetting = TaskVectorForgetting(rate=RATE, forget_epochs=1, retain=_retained())
    fit(module, data, forgetting, look, max_epochs=2)
    plain, seen = foreign(), _Weights("on_train_batch_start")
    other = TaskVectorForgetting(rate=RATE, forget_epochs=1)
    fit(plain, OldThenNew(data_of(), 1), other, seen, max_epochs=2)
    start = weights_of(foreign().net)
    first = len(look.seen) // 2

    def moved(found: dict[str, Tensor]) -> float:
        return sum(float((found[f"net.{n}"] - t).square().sum()) for n, t in start.items())

    assert 0 < moved(look.seen[first]) < moved(seen.seen[first])


def test_what_is_to_be_kept_needs_the_old_answers(vector: Path) -> None:
    module = foreign()
    before = weights_of(module)
    loaders = (data_of().train_dataloader(), data_of().val_dataloader())
    forgetting = TaskVectorForgetting(str(vector), RATE, retain=_retained())
    with pytest.raises(EditError, match="has no `old_requests`"):
        quiet_trainer(forgetting).fit(module, *loaders)
    _equal(before, weights_of(module))


@pytest.mark.parametrize("alpha", [-1.0, float("inf"), float("nan")])
def test_weight_of_what_is_to_be_kept_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match="`retain_alpha`"):
        TaskVectorForgetting("folder", retain_alpha=alpha)
