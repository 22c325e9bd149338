# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Forgetting before learning: takes the old knowledge out, then lets the Trainer teach the new."""

from __future__ import annotations

import math
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.callbacks.before_run import BeforeRun
from lightning_edit.callbacks.model_access import find_model, find_tokenizer, model_and_tokens
from lightning_edit.callbacks.run_folder import is_dry
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.change import Change, LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError, RequestError
from lightning_edit.core.hashing import tensor_hash
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import reshard
from lightning_edit.core.wrappers import plain_names
from lightning_edit.data.base import EditDataModule
from lightning_edit.evaluation.scoring import score_targets
from lightning_edit.forgetting.importance import fisher_diagonals, weighted
from lightning_edit.forgetting.subtract import check_rate, forget_, load_task_vector
from lightning_edit.modules.base import EditModule

__all__ = ["TaskVectorForgetting"]

_MEASURED = 256  # old facts by which one sees whether the model knows them
_WEIGHED = 64  # answers by which the importance of parameters is found


class TaskVectorForgetting(CheckedArguments, Callback):
    """F-Learning: θ' = θ − λ τ before the Trainer's own fit learns the new knowledge.

    τ, the task vector of the old knowledge, comes from a folder or is learned in the first epochs
    of the same fit. Works on any LightningModule that holds a Hugging Face model and trains it by
    Lightning's loop; what the module trains decides the variant of the paper:

    * full fine-tuning with a full task vector: F-Learning_FT
    * a LoRA adapter with the task vector of another: F-Learning_LoRA
    * full fine-tuning with the task vector of an adapter: F-Learning_LoRA-FT

    Callbacks that measure the model as it was, such as `EditEvaluator`, are listed before this one.

    The subtraction happens in ``on_train_start``, or when the first phase ends, in float32, once:
    a resumed run does not repeat it. Until the first phase ends, checkpoints hold a copy of the
    trainable weights as they were at its beginning.

    Args:
        task_vector: Folder of τ: a `WeightDelta`, as `SaveTaskVector` writes it, or a LoRA adapter
            of peft.
        rate: λ, the forgetting rate. The paper takes 0.05 to 0.3 for full vectors and 0.7 to 3 for
            those of adapters.
        forget_epochs: Instead of ``task_vector``: the first epochs of the fit learn the old
            knowledge, as `OldThenNew` serves it; then θ ← (1 + λ) θ − λ θ_learned, with a fresh
            optimizer, and the other epochs learn the new.
        save_task_vector: Folder for the vector learned in those epochs.
        old_nll_warning: Warn if the model does not know what it is to forget: if the mean negative
            log-likelihood of the old answers is above this many nats a token. Measured on a data
            module that has ``old_requests`` with a module that keeps its tokenizer; never when
            null.
        model_attribute: Attribute of the LightningModule that holds the model; found by its type
            when null.
        retain: Data whose answers are to be kept. The rate of each parameter is then λ s with
            s = F_old / (F_old + α F_retain), by the Fisher information of the old answers and of
            these, the first 64 of each. Needs the tokenizer and a data module with
            ``old_requests``.
        retain_alpha: α, how much the answers to be kept count.

    Raises:
        ValueError: If the rate or α is negative or not finite, both sources of τ are given, or
            neither.

    Examples:
        >>> forgetting = TaskVectorForgetting(task_vector="vectors/old", rate=0.3)
        >>> forgetting.done
        False

    References:
        Forgetting before Learning, arXiv 2311.08011.
    """

    def __init__(
        self,
        task_vector: str | None = None,
        rate: float = 0.3,
        forget_epochs: int = 0,
        save_task_vector: str | None = None,
        old_nll_warning: float | None = 3.0,
        model_attribute: str | None = None,
        retain: EditDataModule | None = None,
        retain_alpha: float = 1.0,
    ) -> None:
        if not 0 <= retain_alpha < math.inf:
            raise ValueError(
                f"`retain_alpha` is expected to be a finite number, 0 or more, got {retain_alpha}."
            )
        if check_rate(rate) < 0:
            raise ValueError(f"`rate` is expected to be 0 or more, but got {rate}.")
        if forget_epochs < 0:
            raise ValueError(f"`forget_epochs` is expected to be 0 or more, got {forget_epochs}.")
        if (task_vector is None) == (forget_epochs == 0):
            both = "both are" if task_vector else "neither is"
            raise ValueError(
                "The task vector of the old knowledge comes from a folder (`task_vector`) or is "
                f"learned first (`forget_epochs`), but {both} given. Give one of them."
            )
        if save_task_vector and not forget_epochs:
            raise ValueError(
                "`save_task_vector` keeps the vector that is learned in `forget_epochs`, but one "
                "is read from a folder. Leave it out."
            )
        self.task_vector = task_vector
        self.rate = rate
        self.forget_epochs = forget_epochs
        self.save_task_vector = save_task_vector
        self.old_nll_warning = old_nll_warning
        self.model_attribute = model_attribute
        self.retain = retain
        self.retain_alpha = retain_alpha
        #: Whether the old knowledge has been taken out.
        self.done = False
        self._before = BeforeRun(type(self).__name__)
        self._frozen_vector = WeightDelta({})
        self._frozen: dict[str, str] = {}
        self._restored = False

    # -- when --------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.global_step == 0:  # a run of its own, not the continuation of one
            self.done = False
            self._before.forget()
        if isinstance(pl_module, EditModule) and not pl_module.automatic_optimization:
            raise EditError(
                f"{type(pl_module).__name__} writes edits as original + change, so what was taken "
                "out of its originals would come back. Use this callback with `FullTuning`, "
                "`LoRATuning` or a module of your own that trains by Lightning's loop."
            )
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy)):
            raise EditError(
                f"{type(trainer.strategy).__name__} keeps flat copies of the weights, which this "
                "callback cannot change. Use one device, DDP or `ModelParallelStrategy`."
            )
        epochs = getattr(_data(trainer), "forget_epochs", self.forget_epochs)
        if epochs != self.forget_epochs:
            raise EditError(
                f"The data serve old knowledge for {epochs} epochs, but `forget_epochs` of "
                f"TaskVectorForgetting is {self.forget_epochs}. Give both the same number."
            )
        last = trainer.max_epochs
        if last is not None and 0 <= last <= self.forget_epochs and not is_dry(trainer):
            raise EditError(
                f"`forget_epochs` is {self.forget_epochs} and the Trainer's `max_epochs` {last}, "
                "so no epoch is left to learn the new knowledge. Set `max_epochs` to the sum of "
                "both phases."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_fit_start: sharded strategies restore checkpoints only after it.
        model = find_model(pl_module, self.model_attribute)
        if self.done:
            self._reinstate(model)
        elif self._before.is_loaded:
            self._before.begin(model)
        else:
            self._check_retain(trainer, pl_module)
            self._warn_if_unknown(trainer, pl_module, model)
            reshard(pl_module)
            if self.task_vector is not None:
                vector = load_task_vector(self.task_vector, model)
                self._forget(model, self._spared(trainer, pl_module, vector))
            elif trainer.current_epoch:
                raise EditError(
                    f"The run goes on at epoch {trainer.current_epoch} from a checkpoint that was "
                    "written without TaskVectorForgetting, so the weights before the old knowledge "
                    "was learned are not known. Start from the beginning, or give `task_vector`."
                )
            else:
                self._before.begin(model)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_first_phase(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        # A run resumed at the very end of the first phase skips on_train_epoch_start.
        self._end_first_phase(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.done:
            self._reinstate(find_model(pl_module, self.model_attribute))

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    # -- what --------------------------------------------------------------------------------

    def _end_first_phase(self, trainer: Trainer, pl_module: LightningModule) -> None:
        base = self._before.weights
        if base is None or trainer.current_epoch < self.forget_epochs:
            return
        model = find_model(pl_module, self.model_attribute)
        self._before.forget()
        if self.save_task_vector and not is_dry(trainer):
            base.save_task_vector(
                model, self.save_task_vector, {"epochs": self.forget_epochs}, trainer.is_global_zero
            )
        if base.adapts or self.retain is not None:
            vector = self._spared(trainer, pl_module, base.task_vector(model))
            base.restore_(model)
            self._forget(model, vector)
        else:
            base.forget_learned_(model, self.rate)
            self._tell()
        # Moments and schedules of the old knowledge are of no use to the new.
        trainer.strategy.setup_optimizers(trainer)

    def _forget(self, model: nn.Module, vector: WeightDelta) -> None:
        named, names = dict(model.named_parameters()), plain_names(model)
        frozen = [name for name in vector.changes if not named[names[name]].requires_grad]
        # A checkpoint of an adapter may leave out the weights beneath it.
        self._frozen = {name: tensor_hash(named[names[name]]) for name in frozen}
        if self.task_vector is None or self.retain is not None:  # else it is read again
            self._frozen_vector = WeightDelta({name: vector.changes[name] for name in frozen})
        forget_(model, vector, self.rate)
        self._tell()

    def _check_retain(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.retain is None:
            return
        model_and_tokens(pl_module, self.model_attribute, type(self).__name__)
        if not getattr(_data(trainer), "old_requests", None):
            raise EditError(
                "`retain` weighs what is to be kept against the old answers, but the Trainer's "
                "data module has no `old_requests`. Give one of this package, or leave `retain` "
                "out."
            )
        self.retain.setup("fit")

    def _spared(
        self, trainer: Trainer, pl_module: LightningModule, vector: WeightDelta
    ) -> WeightDelta:
        """τ by the importance of each parameter, where there is something to be kept."""
        if self.retain is None:
            return vector
        model, tokens = model_and_tokens(pl_module, self.model_attribute, type(self).__name__)
        old: list[EditRequest] = getattr(_data(trainer), "old_requests", [])

        def diagonals(requests: list[EditRequest]) -> dict[str, Tensor]:
            found = fisher_diagonals(model, tokens, requests[:_WEIGHED], list(vector.changes))
            # Of equal processes; but their last bits may differ, and the weights must not.
            return {name: trainer.strategy.reduce(f) for name, f in found.items()}

        kept = diagonals(self.retain.requests)
        return weighted(vector, diagonals(old), kept, self.retain_alpha)

    def _tell(self) -> None:
        self.done = True
        rank_zero_info(f"Forgot the old knowledge: θ' = θ − {self.rate:g} τ. Now learning the new.")

    def _reinstate(self, model: nn.Module) -> None:
        """Takes the old knowledge out again where weights were loaded afresh, not restored."""
        if not self._restored:
            return
        self._restored = False
        named, names = dict(model.named_parameters()), plain_names(model)
        fresh = [
            name
            for name, digest in self._frozen.items()
            if name in names and tensor_hash(named[names[name]]) == digest
        ]
        if fresh:
            vector = self._frozen_vector
            if not vector.changes and self.task_vector is not None:
                vector = load_task_vector(self.task_vector, model)
            forget_(model, WeightDelta({name: vector.changes[name] for name in fresh}), self.rate)

    def _warn_if_unknown(
        self, trainer: Trainer, pl_module: LightningModule, model: nn.Module
    ) -> None:
        tokens = find_tokenizer(pl_module, model)
        try:
            old = getattr(_data(trainer), "old_requests", None)
        except RequestError:  # a request does not name its old answer
            old = None
        if self.old_nll_warning is None or tokens is None or not old:
            return
        asked = old[:_MEASURED]
        pairs = [
            (tokens.prompt(r.prompt), tokens.target(r.prompt, r.target_new, r.glued)) for r in asked
        ]
        with trainer.precision_plugin.forward_context():
            scores = score_targets(model, tokens, pairs)
        nll = sum(score.nll for score in scores) / len(scores)
        if nll > self.old_nll_warning:
            rank_zero_warn(
                f"The model does not know what it is to forget: the old answers have a mean "
                f"negative log-likelihood of {nll:.2f} nats a token (`old_nll_warning` is "
                f"{self.old_nll_warning:g}). Forgetting then only does damage. Tune the model on "
                "the old knowledge first, as the paper does, or lower `rate`."
            )

    # -- checkpoints -------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, object]:
        return {"done": self.done, "rate": self.rate, "frozen": dict(self._frozen)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = bool(state_dict["done"])
        self._frozen = dict(state_dict["frozen"])
        self._restored = True
        if self.done and state_dict["rate"] != self.rate:
            rank_zero_warn(
                f"The run that is resumed forgot at the rate {state_dict['rate']:g}; `rate` is "
                f"{self.rate:g} now, which comes too late. Start anew to change it."
            )
            self.rate = float(state_dict["rate"])

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        self._before.save(lambda: find_model(pl_module, self.model_attribute), checkpoint)
        vector: dict[str, Tensor] = {}
        for name, change in self._frozen_vector.changes.items():
            factors = (change.u, change.v) if isinstance(change, LowRank) else (change,)
            vector |= {f"{name}.{i}": factor for i, factor in enumerate(factors)}
        if vector:
            held = cast("dict[str, object]", checkpoint.setdefault(type(self).__name__, {}))
            held["vector"] = vector

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._before.load(checkpoint)
        factors: dict[str, Tensor] = checkpoint.get(type(self).__name__, {}).get("vector", {})
        changes: dict[str, Change] = {}
        for key, first in factors.items():
            name, _, place = key.rpartition(".")
            if place == "0":
                second = factors.get(f"{name}.1")
                changes[name] = first if second is None else LowRank(first, second)
        self._frozen_vector = WeightDelta(changes)


def _data(trainer: Trainer) -> object:
    return getattr(trainer, "datamodule", None)
