# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Rules for a model that a method has no preset for: which settings are tried, and why."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.request import EditRequest
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.passes.sampling import sample_templates
from lightning_edit.tracing.causal_tracing import propose_layers, trace_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Axis", "ModelAtHand", "axes_of", "layers_to_try"]

# Tracing says where a fact is recalled; more facts say it more surely, and each takes seconds.
TRACED_FACTS = 5
# Restored MLPs mark the middle of where to edit, and layers above it often do as well (arXiv
# 2301.04213): as shares of the depth.
UPWARDS = (0.0, 0.1, 0.2)
# A target value may differ from v by so many times the class's own share of ‖v‖.
CLAMPS = (0.5, 1.0, 2.0)
# Shares that carry over between models, where a strength (λ) does not.
SHARES = {"written_share": (0.8, 0.9, 0.97), "protected_share": (0.6, 0.7, 0.8)}


@dataclass(frozen=True)
class Axis:
    """A setting, and what is tried of it.

    Args:
        name: The argument of the editor.
        values: What to try; the first is what would be taken without a search.
        reason: Why these.
    """

    name: str
    values: Sequence[object]
    reason: str


@dataclass(frozen=True)
class ModelAtHand:
    """A model, and facts that it knows.

    Args:
        model: An unedited decoder-only model.
        tokenizer: Its tokenizer.
        known: Facts whose old answer it gives.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    known: Sequence[EditRequest]


def axes_of(method: type[LocateModule], at: ModelAtHand, seed: int = 0) -> Iterator[Axis]:
    """What to try for a method on a model, in the order in which it is decided.

    Args:
        method: Class of a locate-then-edit method.
        at: The model.
        seed: Of sampled contexts.
    """
    layers = layers_to_try(method, at)
    reason = "causal tracing of facts that the model knows, and layers above"
    yield Axis("layers", layers, reason)
    arguments = inspect.signature(method).parameters
    for name, values in SHARES.items():
        if name in arguments:
            yield Axis(name, _own_first(arguments[name].default, values), "by measurement")
    clamp = _default(method, "clamp_norm_factor")
    clamps = [round(clamp * factor, 4) for factor in CLAMPS]
    yield Axis("clamp_norm_factor", _own_first(clamp, clamps), "times ‖v‖, by measurement")
    tokens = PromptTokenizer(at.tokenizer)
    more = sample_templates(at.model, tokens, seed, 4, (10,))
    grouped = [["{}"], more] if method.groups_contexts else [["{}", *more]]
    yield Axis("context_templates", [None, grouped], "contexts sampled from the model")


def layers_to_try(method: type[LocateModule], at: ModelAtHand) -> list[list[int]]:
    """Layers by the method's rule of depth, and by causal tracing, each once.

    Args:
        method: Class of a locate-then-edit method.
        at: The model.
    """
    editor = method.from_model(at.model, at.tokenizer)
    by_depth = list(editor.default_layers(editor.tree))
    depth, count = len(editor.tree.blocks), len(by_depth)
    with_subject = [request for request in at.known if request.subject][:TRACED_FACTS]
    traced = trace_facts(at.model, PromptTokenizer(at.tokenizer), with_subject)
    found = propose_layers(traced, count) if traced.facts else []
    tried = [by_depth]
    for share in UPWARDS if found else ():
        start = min(found[0] + round(share * depth), depth - count)
        tried.append(list(range(start, start + count)))
    return [layers for i, layers in enumerate(tried) if layers not in tried[:i]]


def _default(method: type[LocateModule], name: str) -> float:
    """A default of the class, or of the one that it hands the argument on to."""
    for owner in method.__mro__:
        parameter = inspect.signature(owner).parameters.get(name)
        if parameter is not None:
            return float(parameter.default)
    raise AssertionError(f"{method.__name__} has no `{name}`.")


def _own_first(own: float, values: Sequence[float]) -> list[object]:
    return [own, *(value for value in values if value != own)]
