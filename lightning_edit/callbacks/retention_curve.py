# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The memory of a run: which earlier edits still hold, and how the model reads prose meanwhile."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_edit.callbacks.model_access import model_and_tokens, unedited
from lightning_edit.callbacks.run_folder import is_dry, run_folder
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.errors import EditError, MissingDependencyError
from lightning_edit.core.request import EditRequest
from lightning_edit.evaluation.prose import perplexity, read_prose
from lightning_edit.evaluation.retention_plot import plot_retention
from lightning_edit.evaluation.scoring import score_targets
from lightning_edit.functional.retention import (
    average_retention,
    edits_held,
    forgetting,
    retention_area,
    retention_by_age,
)
from lightning_edit.modules.base import EditModule

__all__ = ["RetentionCurve"]


class RetentionCurve(CheckedArguments, Callback):
    """Follows a sequence of edits: which earlier ones still hold, and what all of them cost.

    After every so many edits of ``fit``, or of ``test`` with the sequential protocol, all edits
    made so far are asked for together, teacher-forced, and one counts as held when every token of
    its answer is the model's own choice. That is the row R(t, ·) of the retention matrix. Beside
    it stands the model's perplexity on held-out prose. Measured where a batch ends; a request
    counts as made when its batch was first trained on.

    Writes ``retention.json`` and, with matplotlib, ``retention.png``. Logs ``retention/held``, the
    share of the edits so far that hold, and ``retention/perplexity``, to loggers by the number of
    edits; ``test`` returns the last ones under ``test/``. Works with an editor and with any
    LightningModule that holds a Hugging Face model and its tokenizer and is trained on edit
    requests. Under several processes each measures all.

    Args:
        every_n_edits: Measure after every so many edits, and after the last one.
        text: A UTF-8 file of held-out prose; a page that comes with the package when None.
        threshold: Share of edits that must hold for a number of edits to count as held.
        max_perplexity_rise: Share by which perplexity may rise meanwhile.
        dirpath: Folder of the files; the Trainer's log or root folder when None.
        model_attribute: Attribute of the LightningModule that holds the model; found by its type
            when None.

    Examples:
        >>> RetentionCurve(every_n_edits=100).steps
        []
    """

    def __init__(
        self,
        every_n_edits: int = 10,
        text: str | None = None,
        threshold: float = 0.8,
        max_perplexity_rise: float = 0.1,
        dirpath: str | None = None,
        model_attribute: str | None = None,
    ) -> None:
        if every_n_edits < 1:
            raise ValueError(
                f"`every_n_edits` is expected to be at least 1, but got {every_n_edits}."
            )
        self.every_n_edits = every_n_edits
        self.text = read_prose(text)
        self.threshold = threshold
        self.max_perplexity_rise = max_perplexity_rise
        self.dirpath = dirpath
        self.model_attribute = model_attribute
        #: Numbers of edits after which was measured.
        self.steps: list[int] = []
        #: After each of them, whether the edits made so far hold, the first one first.
        self.held: list[list[bool]] = []
        #: Perplexity after each of them, and of the unedited model.
        self.perplexity: list[float] = []
        self.perplexity_before = math.nan
        # Edits so far: id to prompt and answer.
        self._made: dict[str, tuple[str, str, bool | None]] = {}
        self._restored: Mapping[str, Any] | None = None
        self._is_finished = False

    @property
    def sequence(self) -> list[dict[str, float]]:
        """Points of the curve as a report draws them, with the keys of its metrics."""
        return [
            {
                "edits": step,
                "retention/teacher_forced_strict": sum(held) / len(held),
                "perplexity_ratio": perplexity / self.perplexity_before,
            }
            for step, held, perplexity in zip(self.steps, self.held, self.perplexity, strict=True)
        ]

    @property
    def retention(self) -> Tensor:
        """R(t, k), [S, K] float64: nan where edit k was not yet made."""
        matrix = torch.full((len(self.held), len(self._made)), math.nan, dtype=torch.float64)
        for row, held in zip(matrix, self.held, strict=True):
            row[: len(held)] = torch.tensor(held, dtype=torch.float64)
        return matrix

    # -- fit ---------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After checkpoints are restored: reads the prose with the unedited model."""
        restored, self._restored = self._restored, None
        self._begin(pl_module, restored)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Measures where the number of edits has passed a multiple of ``every_n_edits``."""
        if self._add(trainer, pl_module, batch):
            for name, value in self._measure(trainer, pl_module).items():
                pl_module.log(name, value, logger=False, batch_size=1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures after the last edit and writes the files."""
        self.finish(trainer, pl_module)

    # -- test --------------------------------------------------------------------------------

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the sequential protocol: reads the prose with the unedited model."""
        if _is_sequence(pl_module):
            self._begin(pl_module)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measures where the number of edits has passed a multiple of ``every_n_edits``."""
        if _is_sequence(pl_module) and self._add(trainer, pl_module, batch):
            self._measure(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """While all edits are still in the model: measures once more and writes the files."""
        if _is_sequence(pl_module) and self._made:
            for name, value in self.finish(trainer, pl_module).items():
                pl_module.log(f"test/{name}", value)

    # -- the sequence ------------------------------------------------------------------------

    def _begin(self, pl_module: LightningModule, restored: Mapping[str, Any] | None = None) -> None:
        restored = restored or {}
        self._is_finished = False
        self.steps = list(restored.get("steps", []))
        self.held = [list(row) for row in restored.get("held", [])]
        self.perplexity = list(restored.get("perplexity", []))
        self._made = {
            id_: (p, a, *(glued or [None]))
            for id_, (p, a, *glued) in restored.get("made", {}).items()
        }
        if restored:
            self.perplexity_before = float(restored["perplexity_before"])
            return
        model, tokens = model_and_tokens(pl_module, self.model_attribute, "RetentionCurve")
        with unedited(pl_module):
            self.perplexity_before = perplexity(model, tokens, self.text)

    def _add(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> bool:
        """Takes in a batch; whether it is time to measure."""
        items = list(batch) if isinstance(batch, Sequence) else [batch]
        requests = [r for r in items if isinstance(r, EditRequest)]
        strange = [type(r).__name__ for r in items if not isinstance(r, EditRequest)]
        if strange:
            raise EditError(
                "RetentionCurve follows edit requests, but a batch holds "
                f"{', '.join(sorted(set(strange)))}. Train {type(pl_module).__name__} on batches "
                "of `EditRequest`, as the data modules of this package give them."
            )
        before = len(self._made)
        parts = [[(r.id, r.prompt, r.target_new, r.glued) for r in requests]]
        if trainer.world_size > 1:  # each process may have had requests of its own
            parts = parts * trainer.world_size
            torch.distributed.all_gather_object(parts, parts[0])
        for part in parts:
            for id_, prompt, answer, glued in part:
                self._made.setdefault(id_, (prompt, answer, glued))
        return len(self._made) // self.every_n_edits > before // self.every_n_edits

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Adds a row, logs it and writes what there is so far."""
        model, tokens = model_and_tokens(pl_module, self.model_attribute, "RetentionCurve")
        pairs = [(tokens.prompt(row[0]), tokens.target(*row)) for row in self._made.values()]
        scores = score_targets(model, tokens, pairs)
        self.perplexity.append(perplexity(model, tokens, self.text))
        self.held.append([score.argmax == score.target for score in scores])
        self.steps.append(len(pairs))
        share = sum(self.held[-1]) / len(pairs)
        found = {"retention/held": share, "retention/perplexity": self.perplexity[-1]}
        for logger in trainer.loggers:
            logger.log_metrics(found, step=len(pairs))
        self._write(trainer)
        return found

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Measures after the last edit and writes the files, once.

        Called by the report as well, so that the order of the callbacks does not matter.

        Returns:
            The last figures by name; none where nothing was edited.
        """
        if not self._made:
            return {}
        if self.steps[-1:] != [len(self._made)]:
            self._measure(trainer, pl_module)
        held, made = sum(self.held[-1]), len(self._made)
        figures = {"retention/held": held / made, "retention/perplexity": self.perplexity[-1]}
        if self._is_finished:
            return figures
        self._is_finished = True
        rank_zero_info(
            f"Retention  {held} of {made} edits hold · perplexity {self.perplexity_before:.1f} → "
            f"{self.perplexity[-1]:.1f}"
        )
        if (folder := self._folder(trainer)) is not None:
            try:
                plot_retention(
                    self.retention, self.steps, self.perplexity, self.perplexity_before
                ).savefig(folder / "retention.png")
            except MissingDependencyError as error:
                rank_zero_info(str(error))
        return figures

    def summary(self) -> dict[str, object]:
        """What ``retention.json`` holds: the matrix, its figures and the perplexities.

        Raises:
            ValueError: If nothing was measured.
        """
        matrix, steps = self.retention, self.steps
        average = average_retention(matrix, steps)
        # The change of a broken model is infinite.
        rise = torch.tensor(self.perplexity, dtype=torch.float64) / self.perplexity_before - 1
        held = edits_held(average, self.threshold, rise, self.max_perplexity_rise, steps)
        return {
            "requests": list(self._made),
            "steps": steps,
            "held": [[int(hit) for hit in row] for row in self.held],
            "average_retention": average.tolist(),
            "forgetting": forgetting(matrix, steps).tolist(),
            "retention_by_age": retention_by_age(matrix, steps).tolist(),
            "retention_area": retention_area(average, steps),
            "perplexity_before": _finite(self.perplexity_before),
            "perplexity": [_finite(value) for value in self.perplexity],
            "threshold": self.threshold,
            "max_perplexity_rise": self.max_perplexity_rise,
            "edits_held": held,
        }

    def _write(self, trainer: Trainer) -> None:
        if (folder := self._folder(trainer)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.summary(), ensure_ascii=False, allow_nan=False)
            (folder / "retention.json").write_text(text + "\n", encoding="utf-8")

    def _folder(self, trainer: Trainer) -> Path | None:
        folder = run_folder(trainer, self.dirpath)
        return folder if trainer.is_global_zero and not is_dry(trainer) else None

    # -- checkpoints -------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, object]:
        if not self._made:
            return {}
        return {
            "made": {id_: list(pair) for id_, pair in self._made.items()},
            "steps": list(self.steps),
            "held": [list(row) for row in self.held],
            "perplexity": list(self.perplexity),
            "perplexity_before": self.perplexity_before,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None


def _is_sequence(pl_module: LightningModule) -> bool:
    return isinstance(pl_module, EditModule) and pl_module.test_protocol == "sequential"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
