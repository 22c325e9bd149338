# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""F-Learning against reference figures that were made by direct arithmetic, without a Trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_edit import OldThenNew, SaveTaskVector, TaskVectorForgetting, WeightDelta
from lightning_edit.forgetting.subtract import load_task_vector, sweep_forgetting
from tests.callbacks.foreign import quiet_trainer

TOLERANCE = 2e-3

Batch = dict[str, Tensor]


class Tokens(LightningModule):
    """Learns batches of token ids, all parameters or those of an adapter."""

    def __init__(self, net: Any, lr: float) -> None:
        super().__init__()
        self.net = net.train()
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.net.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0, fused=True)


class Figures:
    """A model, the batches of the reference run, and comparisons with its figures."""

    def __init__(self, model: Any, folder: Path) -> None:
        inputs = json.loads((folder / "inputs.json").read_text())
        self.wanted = json.loads((folder / "outputs.json").read_text())
        self.batches = {
            name: {key: torch.tensor(value) for key, value in batch.items()}
            for name, batch in inputs["batches"].items()
        }
        self.model = model

    def loader(self, name: str) -> DataLoader[Batch]:
        """Rows 0 and 1, then rows 2 and 3."""
        rows = [slice(0, 2), slice(2, 4)]
        return DataLoader(
            [{k: v[part] for k, v in self.batches[name].items()} for part in rows],  # type: ignore[arg-type]
            batch_size=None,
        )

    def fit(
        self, net: Any, data: Any, *callbacks: Callback, lr: float = 5e-5, max_epochs: int = 1
    ) -> list[float]:
        """Losses of the steps."""
        module = Tokens(net, lr)
        every = 1 if isinstance(data, OldThenNew) else 0
        trainer = quiet_trainer(
            *callbacks, max_epochs=max_epochs, reload_dataloaders_every_n_epochs=every
        )
        trainer.fit(module, data)
        return module.losses

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Whole-batch losses, with logits only where one is read."""
        found = {}
        for name, batch in self.batches.items():
            ids, mask, labels = (batch[key] for key in ("input_ids", "attention_mask", "labels"))
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            read = labels[:, 1:] != -100
            logits = self.model.lm_head(hidden[:, :-1][read])
            found[name] = float(cross_entropy(logits, labels[:, 1:][read]))
        return found

    def compare(self, found: Any, *path: str) -> None:
        wanted: Any = self.wanted
        for key in path:
            wanted = wanted[key]
        assert found == pytest.approx(wanted, rel=TOLERANCE), path

    def compare_norms(self, vector: WeightDelta, *path: str) -> None:
        wanted: Any = self.wanted
        for key in path:
            wanted = wanted[key]
        norms = vector.norms()
        assert vector.norm() == pytest.approx(wanted["total"], rel=TOLERANCE)
        for name, norm in wanted["selected"].items():
            assert norms[name] == pytest.approx(norm, rel=TOLERANCE), name

    def compare_entries(self, vector: WeightDelta, key: str) -> None:
        for name, entries in self.wanted[key]["first8"].items():
            first = vector.dense(name).flatten()[:8].tolist()
            assert first == pytest.approx(entries, rel=TOLERANCE, abs=1e-6), name

    @contextmanager
    def adapter(self) -> Iterator[Any]:
        """The model with a LoRA adapter whose A is pinned."""
        import peft

        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(self.model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_A." in name:
                    parameter.copy_(_pinned(parameter, name))
        try:
            yield adapted
        finally:
            adapted.unload()
            self.model.requires_grad_(True)


def _pinned(parameter: Tensor, name: str) -> Tensor:
    layer = int(name.split(".layers.")[1].split(".")[0])
    phase = 1.3 * layer + (0.0 if ".q_proj." in name else 2.1)
    k = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
    return torch.sin(0.37 * k + phase) / math.sqrt(parameter.shape[1])


def _copy(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def _set(model: Any, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_goldens(default_model: tuple[Any, Any], goldens: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = default_model[0]
    run = Figures(model, goldens / "f_learning")
    base = _copy(model)
    try:
        _run(run, base, tmp_path)
    finally:
        _set(model, base)
        model.eval()


def _run(run: Figures, base: dict[str, Tensor], folder: Path) -> None:
    model, old, new = run.model, run.loader("old"), run.loader("new")
    run.compare(run.measure(), "base_losses")
    losses = run.fit(model, old, max_epochs=3)
    run.compare(losses, "original_model_train_losses")
    run.compare(run.measure(), "original_model")
    theta = _copy(model)
    run.compare_norms(WeightDelta.between(base, theta), "original_minus_base")

    full, adapter = folder / "full", folder / "adapter"
    losses = run.fit(model, old, SaveTaskVector(str(full)))
    run.compare(losses, "FT_task_vector", "train_losses")
    run.compare(run.measure(), "FT_task_vector", "losses_at_theta_plus_delta")
    _set(model, theta)
    vector = load_task_vector(full, model)
    run.compare_norms(vector, "FT_task_vector", "norms")
    run.compare_entries(vector, "FT_task_vector")
    rates = [float(rate) for rate in run.wanted["forget_FT"]]
    for row in sweep_forgetting(model, vector, rates, run.measure):
        run.compare(row, "forget_FT", str(row.pop("rate")))

    losses = run.fit(model, new, TaskVectorForgetting(str(full), rate=0.3))
    run.compare(losses, "F-Learning_FT_lam0.3_1epoch", "train_losses")
    run.compare(run.measure(), "F-Learning_FT_lam0.3_1epoch", "losses")
    change = WeightDelta.between(theta, _copy(model))
    run.compare_norms(change, "F-Learning_FT_lam0.3_1epoch", "theta_star_minus_original")

    # The same in one fit: the old knowledge first, then the new.
    _set(model, theta)
    data = OldThenNew.from_dataloaders(old, new, forget_epochs=1)
    losses = run.fit(model, data, TaskVectorForgetting(rate=0.3, forget_epochs=1), max_epochs=2)
    run.compare(losses[:2], "FT_task_vector", "train_losses")
    run.compare(losses[2:], "F-Learning_FT_lam0.3_1epoch", "train_losses")
    run.compare(run.measure(), "F-Learning_FT_lam0.3_1epoch", "losses")

    _set(model, theta)
    losses = run.fit(model, new)
    run.compare(losses, "Full-FT_no_forget_1epoch", "train_losses")
    run.compare(run.measure(), "Full-FT_no_forget_1epoch", "losses")

    _set(model, theta)
    with run.adapter() as adapted:
        losses = run.fit(adapted, old, SaveTaskVector(str(folder / "factors")), lr=1e-3)
        adapted.save_pretrained(adapter, save_embedding_layers=False)
    run.compare(losses, "LoRA_task_vector", "train_losses")
    vector = load_task_vector(adapter, model)
    run.compare_norms(vector, "LoRA_task_vector")
    run.compare_entries(vector, "LoRA_task_vector")
    run.compare_norms(load_task_vector(folder / "factors", model), "LoRA_task_vector")
    rates = [float(rate) for rate in run.wanted["forget_LoRA"]]
    for row in sweep_forgetting(model, vector, rates, run.measure):
        run.compare(row, "forget_LoRA", str(row.pop("rate")))

    with run.adapter() as adapted:
        forgetting = TaskVectorForgetting(str(adapter), rate=0.7)
        learned = SaveTaskVector(str(folder / "learned"))
        losses = run.fit(adapted, new, forgetting, learned, lr=1e-3)
        run.compare(losses, "F-Learning_LoRA_lam0.7_1epoch", "train_losses")
        run.compare(run.measure(), "F-Learning_LoRA_lam0.7_1epoch", "losses")
    norm = load_task_vector(folder / "learned", model).norm()
    run.compare(norm, "F-Learning_LoRA_lam0.7_1epoch", "new_lora_total")

    _set(model, theta)
    with run.adapter() as adapted:
        losses = run.fit(adapted, new, lr=1e-3)
        run.compare(losses, "LoRA_no_forget_1epoch", "train_losses")
        run.compare(run.measure(), "LoRA_no_forget_1epoch", "losses")

    _set(model, theta)
    losses = run.fit(model, new, TaskVectorForgetting(str(adapter), rate=3.0))
    run.compare(losses, "F-Learning_LoRA-FT_lam3_1epoch", "train_losses")
    run.compare(run.measure(), "F-Learning_LoRA-FT_lam3_1epoch", "losses")
    change = WeightDelta.between(theta, _copy(model))
    run.compare_norms(change, "F-Learning_LoRA-FT_lam3_1epoch", "theta_star_minus_original")
