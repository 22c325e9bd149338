# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a run did beside its edits: prose, fluency, prompts in another guise, capabilities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_edit.callbacks.model_access import find_requests, model_and_tokens, unedited
from lightning_edit.callbacks.run_folder import is_dry, run_folder
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.errors import EditError
from lightning_edit.core.files import replacing
from lightning_edit.core.request import EditRequest
from lightning_edit.evaluation.prose import perplexity, read_prose
from lightning_edit.evaluation.side_effects import (
    DENIALS,
    PREFIXES,
    answered,
    capabilities,
    fluency,
)

__all__ = ["SideEffects"]


class SideEffects(CheckedArguments, Callback):
    """Measures before and after ``fit`` what the edits do to all else.

    | name | is |
    |---|---|
    | ``perplexity`` | of held-out prose |
    | ``fluency`` | entropy of n-grams after the edited prompts, as a share of the largest |
    | ``after_prefix`` | share of edited prompts, behind unrelated texts, that get the new answer |
    | ``after_denial`` | the same of prompts that are denied first, which are not to get it |
    | ``<task>/<metric>`` | of lm-eval's ``tasks`` |

    Writes ``side_effects.json`` and logs the values after the run as ``side_effects/<name>``, also
    to ``trainer.callback_metrics``. Works with an editor and with any LightningModule that holds a
    Hugging Face model and its tokenizer. Under several processes each measures all.

    Args:
        requests: What to ask; the requests of the Trainer's datamodule when None.
        prefixes: Unrelated texts, with ``{}`` for the prompt.
        denials: Denials, with ``{}`` for the prompt.
        length: Tokens of a text whose fluency is measured; none is written if 0.
        text: A UTF-8 file of held-out prose; a page that comes with the package when None.
        tasks: Names of tasks of lm-eval, which needs the extra ``capability``.
        task_limit: Documents of each task; all of them when None.
        task_folder: Folder of further tasks in lm-eval's YAML.
        dirpath: Folder of the file; the Trainer's log or root folder when None.
        model_attribute: Attribute of the LightningModule that holds the model; found by its type
            when None.

    Raises:
        ValueError: If a template has no place for the prompt, or the length is below 0.

    Examples:
        >>> SideEffects(tasks=["arc_easy"], task_limit=100).rows
        {}
    """

    def __init__(
        self,
        requests: list[EditRequest] | None = None,
        prefixes: Sequence[str] = PREFIXES,
        denials: Sequence[str] = DENIALS,
        length: int = 60,
        text: str | None = None,
        tasks: Sequence[str] = (),
        task_limit: int | None = None,
        task_folder: str | None = None,
        dirpath: str | None = None,
        model_attribute: str | None = None,
    ) -> None:
        for name, templates in (("prefixes", prefixes), ("denials", denials)):
            if wrong := [template for template in templates if "{}" not in template]:
                raise ValueError(
                    f"`{name}` are expected to hold {{}} for the prompt, but got {wrong[0]!r}."
                )
        if length < 0:
            raise ValueError(f"`length` is expected to be at least 0, but got {length}.")
        self.requests = requests
        self.prefixes = tuple(prefixes)
        self.denials = tuple(denials)
        self.length = length
        self.text = read_prose(text)
        self.tasks = tuple(tasks)
        self.task_limit = task_limit
        self.task_folder = task_folder
        self.dirpath = dirpath
        self.model_attribute = model_attribute
        #: Name to values before and after.
        self.rows: dict[str, tuple[float, float]] = {}
        self._before: dict[str, float] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After checkpoints are restored: measures the unedited model."""
        self.rows = {}
        if self._before:  # of the run that goes on here
            return
        with unedited(pl_module):
            self._before = self._measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures what the run leaves, and tells both."""
        after = self._measure(trainer, pl_module)
        self.rows = {name: (self._before.get(name, math.nan), v) for name, v in after.items()}
        self._before = {}
        found = {f"side_effects/{name}": value for name, value in after.items()}
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in found.items()})
        told = " · ".join(f"{name} {a:.3g} → {b:.3g}" for name, (a, b) in self.rows.items())
        rank_zero_info(f"Side effects  {told}")
        folder = run_folder(trainer, self.dirpath)
        if trainer.is_global_zero and not is_dry(trainer):
            folder.mkdir(parents=True, exist_ok=True)
            pairs = {
                name: {"before": _finite(before), "after": _finite(now)}
                for name, (before, now) in self.rows.items()
            }
            with replacing(folder / "side_effects.json") as part:
                part.write_text(json.dumps(pairs, allow_nan=False) + "\n", encoding="utf-8")

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        requests = find_requests(trainer, self.requests, "SideEffects")
        if not requests:
            raise EditError("SideEffects has nothing to ask: `requests` is empty. Give some.")
        model, tokens = model_and_tokens(
            pl_module, self.model_attribute, "SideEffects", measures=True
        )
        found = {"perplexity": perplexity(model, tokens, self.text)}
        if self.length:
            prompts = [request.prompt for request in requests]
            found["fluency"] = fluency(model, tokens, prompts, length=self.length)
        for name, templates in (("after_prefix", self.prefixes), ("after_denial", self.denials)):
            if templates:
                found[name] = answered(model, tokens, requests, templates)
        if self.tasks:
            found |= capabilities(
                model,
                tokens,
                self.tasks,
                limit=self.task_limit,
                include_path=self.task_folder,
            )
        return found

    # -- checkpoints -------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, object]:
        return {"before": dict(self._before)} if self._before else {}

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._before = dict(cast("Mapping[str, float]", state_dict.get("before", {})))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
