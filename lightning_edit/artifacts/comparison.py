# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Two edits, two models, or an edit and a model, compared."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_edit.artifacts.entry_rows import entry_rows, memory_as_found, memory_change
from lightning_edit.artifacts.outcomes import Comparison
from lightning_edit.artifacts.parameter_rows import differing_parameters, parameter_rows
from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.memory import MemoryWrite

__all__ = ["compare_edits", "compare_models", "compare_with_model"]


def compare_edits(
    one: Edit, other: Edit, names: tuple[str, str] = ("first", "second")
) -> Comparison:
    """Compares two edits, of weights parameter by parameter, of memories entry by entry.

    Args:
        one: The first edit.
        other: The second edit; it may be of another kind.
        names: How to call them.

    Raises:
        ArtifactError: If they are of weights of different shapes.

    Examples:
        >>> import torch
        >>> change = LowRank(torch.ones(2, 1), torch.ones(3, 1))
        >>> [row] = compare_edits(WeightDelta({"w": change}), WeightDelta({"w": change}) * -1).rows
        >>> row.rank_first, round(row.cosine, 4)
        (1, -1.0)
    """
    ids, others = one.provenance.request_ids, other.provenance.request_ids
    return Comparison(
        *names,
        tuple(parameter_rows(_of_weights(one), _of_weights(other), names)),
        tuple(i for i in ids if i not in set(others)),
        tuple(i for i in others if i not in set(ids)),
        tuple(i for i in ids if i in set(others)),
        tuple(_notes(one, other)),
        tuple(entry_rows(_of_memory(one), _of_memory(other))),
    )


def compare_with_model(
    edit: Edit, model: nn.Module, names: tuple[str, str] = ("edit", "model")
) -> Comparison:
    """Compares an edit with what became of a model, where the edit changes it.

    Args:
        edit: An edit; one of weights has to keep its originals.
        model: Of the same architecture.
        names: How to call them.

    Raises:
        ArtifactError: If the edit lacks originals, or the model lacks a parameter.
    """
    if isinstance(edit, MemoryWrite):
        found, note = memory_as_found(model, edit)
        return Comparison(*names, notes=(note,), entries=tuple(entry_rows(edit, found)))
    delta = _of_weights(edit)
    became, note = _weights_as_found(model, delta, names)
    return Comparison(*names, tuple(parameter_rows(delta, became, names)), notes=(note,))


def compare_models(
    one: nn.Module, other: nn.Module, names: tuple[str, str] = ("first", "second")
) -> Comparison:
    """The change from one model to another, at the parameters and entries that differ.

    Args:
        one: The model before.
        other: The model after.
        names: How to call them.

    Raises:
        ArtifactError: If the models differ in more than the values of their parameters.
    """
    rows = tuple(differing_parameters(one, other, names))
    kinds = [next(model.parameters()).dtype for model in (one, other)]
    notes = []
    if kinds[0] != kinds[1]:
        kinds_text = " and ".join(str(kind).removeprefix("torch.") for kind in kinds)
        notes.append(f"The weights are {kinds_text}: part of the change is rounding.")
    if not rows:
        notes.append("All parameters are equal.")
    entries = entry_rows(None, memory_change(one, other))
    return Comparison(*names, rows, notes=tuple(notes), entries=tuple(entries))


def _of_weights(edit: Edit) -> WeightDelta:
    return edit if isinstance(edit, WeightDelta) else WeightDelta({})


def _of_memory(edit: Edit) -> MemoryWrite | None:
    return edit if isinstance(edit, MemoryWrite) else None


def _weights_as_found(
    model: nn.Module, edit: WeightDelta, names: tuple[str, str]
) -> tuple[WeightDelta, str]:
    """What became of the parameters that an edit changes, and what that says in words."""
    missing = [name for name in edit.changes if name not in edit.originals]
    if missing:
        raise ArtifactError(
            f"The edit in {names[0]} does not keep the originals of {', '.join(missing[:3])}, "
            "with which a model is compared. Write the edited model (`apply`) and compare two "
            "models instead."
        )
    parameters = dict(model.named_parameters())
    changes: dict[str, LowRank | Tensor] = {}
    holds, is_base = True, True
    for name in edit.changes:
        if name not in parameters or parameters[name].shape != edit.changes[name].shape:
            raise ArtifactError(
                f"The model {names[1]} has no `{name}` of the shape "
                f"{list(edit.changes[name].shape)}, which the edit in {names[0]} changes. Name a "
                f"model like {edit.provenance.base.id or 'its base'}."
            )
        found = parameters[name].detach().cpu()
        changes[name] = change = found.float() - edit.originals[name].float()
        is_base = is_base and not bool(change.any())
        holds = holds and edit.wrote(name, found)
    note = "The model has neither its original weights here nor those of this edit alone."
    if is_base:
        note = "The model has its original weights here: the edit is not in it."
    elif holds:
        note = "The edit is in the model."
    return WeightDelta(changes, originals=edit.originals), note


def _notes(one: Edit, other: Edit) -> Iterator[str]:
    bases = [edit.provenance.base for edit in (one, other)]
    if all(base.sha256 for base in bases) and bases[0].sha256 != bases[1].sha256:
        what = " and ".join(f"{base.id or 'unnamed'} ({base.sha256[:12]}…)" for base in bases)
        yield f"The edits belong to different weights: {what}."
    if one.changes_weights != other.changes_weights:
        yield "The one changes weights, the other a memory: only their requests can be compared."
    elif isinstance(one, MemoryWrite) and isinstance(other, MemoryWrite):
        memories = [(edit.kind, edit.settings) for edit in (one, other)]
        if memories[0] != memories[1]:
            what = " and ".join(f"a {kind} with {settings}" for kind, settings in memories)
            yield f"The edits belong to different memories: {what}."
