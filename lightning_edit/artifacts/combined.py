# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Several saved edits of one model as one LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_edit.artifacts.adapters import model_skeleton, save_adapter
from lightning_edit.artifacts.gguf_adapter import check_gguf, save_gguf
from lightning_edit.artifacts.sources import base_name, facts_of, named_by, open_edit, revision_of
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.lora import LoRAFactors, left_out, same_rank

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Combined", "combine"]


@dataclass(frozen=True)
class Combined:
    """The sum of saved edits as LoRA factors.

    Args:
        folders: Those of the edits, in order.
        edit: The sum.
        factors: Module name to factors.
        source: Name of the base model.
        config: Its configuration.
    """

    folders: tuple[Path, ...]
    edit: WeightDelta
    factors: dict[str, LoRAFactors]
    source: str
    config: PretrainedConfig

    @property
    def rank(self) -> int:
        """The largest of all modules."""
        return max((pair.rank for pair in self.factors.values()), default=0)

    @property
    def relative_error(self) -> float:
        """Share of the sum's norm that the factors leave out."""
        return left_out(self.factors, self.edit.norms())

    def facts(self) -> dict[str, str | float]:
        """What is to be known of the adapter, name -> value."""
        ranks = sorted({pair.rank for pair in self.factors.values()})
        worst = max(pair.relative_error for pair in self.factors.values())
        facts: dict[str, str | float] = {
            "base": self.source,
            **facts_of(self.edit),
            "rank": " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
            "left out": f"{worst:.2g} of the change at most" if worst else "nothing",
        }
        if worst and len(self.factors) > 1:
            facts["left out in all"] = f"{self.relative_error:.2g} of the change"
        return facts

    def notes(self) -> tuple[str, ...]:
        """What is to be said of a module of which something is left out."""
        worst = max(self.factors, key=lambda name: self.factors[name].relative_error)
        is_cut = self.factors[worst].relative_error > 1e-5
        return (f"The most is left out of `{worst}`.",) if is_cut else ()

    def save(self, folder: Path, *, uniform: bool = False, gguf: str = "") -> None:
        """Writes the adapter as peft reads it.

        Args:
            folder: Replaced if it holds a model or an adapter that was written here.
            uniform: Write one rank for all modules.
            gguf: Name of a file in the folder with the same for llama.cpp; none when empty.

        Raises:
            ArtifactError: If there is nothing to write, the folder holds anything else, or
                llama.cpp does not know the architecture.
            MissingDependencyError: If the package gguf is needed and not installed.
        """
        factors = same_rank(self.factors) if uniform else self.factors
        if gguf:
            check_gguf(self.config)
        save_adapter(
            factors,
            folder,
            provenance=self.edit.provenance,
            is_encoder_decoder=bool(self.config.is_encoder_decoder),
            also=lambda staging: save_gguf(factors, self.config, staging / gguf) if gguf else None,
        )


def combine(edits: Sequence[str], model: str | None = None, rank: int | None = None) -> Combined:
    """Reads saved edits and turns their sum into LoRA factors.

    Low-rank changes of one weight are put side by side, which is exact.

    Args:
        edits: Folders of the saved edits, or of the runs that saved them.
        model: The base model, of which the configuration is read. By default the one that the
            first edit names.
        rank: Largest rank of a module. By default nothing is left out.

    Raises:
        ArtifactError: If there is none, one is damaged or of a memory, two are of different
            models, or an adapter cannot hold their sum.
        ModelError: If the model cannot be found.
    """
    if not edits:
        raise ArtifactError("There is no edit to write. Name the folder of one.")
    folders: list[Path] = []
    deltas: list[WeightDelta] = []
    for name in edits:
        artifact, edit = open_edit(name)
        if not isinstance(edit, WeightDelta):
            raise ArtifactError(
                f"`{artifact}` holds an edit of a memory, which changes no weights, so no LoRA "
                "adapter can hold it. Write the base with its memory instead: `apply`, or "
                "`export` to `hf`."
            )
        folders.append(artifact)
        deltas.append(edit)
    first = deltas[0]
    source = base_name(first, folders[0], model)
    bases = {edit.provenance.base.id for edit in deltas} - {""}
    if model is None and len(bases) > 1:
        raise ArtifactError(
            f"The edits record different base models: {', '.join(sorted(bases))}. If these are "
            "names of one model, or edited copies of it, name the base with `model`."
        )
    with named_by(first, given=model is not None):
        skeleton = model_skeleton(source, revision_of(first, source))
    total = reduce(add, deltas)
    return Combined(tuple(folders), total, total.to_lora(skeleton, rank), source, skeleton.config)
