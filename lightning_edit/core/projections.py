# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Projections to edit, as a user names them: by kind or by their own name, in some layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from lightning_edit.core.errors import LocatorError
from lightning_edit.core.locator import ModelTree, ModuleKind, StackKind, WeightSite

__all__ = ["named_sites", "projection_sites"]


def projection_sites(
    tree: ModelTree,
    projections: Sequence[str] | Mapping[str, Sequence[int]],
    layers: Sequence[int] | None,
    default_layers: Callable[[ModelTree], list[int]],
    stacks: Sequence[StackKind] = ("decoder",),
) -> list[WeightSite]:
    """The projections that words stand for, in the model's order, each once.

    Args:
        tree: The model.
        projections: Words as in ``named_sites``; a mapping gives each layers of its own.
        layers: Layers of all words that have none of their own.
        default_layers: Gives the layers of a stack where none are named.
        stacks: Stacks of an encoder-decoder model; other models have one.

    Raises:
        LocatorError: If a layer does not exist or has no such projection, or nothing is named.
    """
    found: dict[str, WeightSite] = {}
    trees = [tree]
    if tree.is_encoder_decoder:
        trees = [ModelTree.of(tree.model, stack) for stack in stacks]
    for one in trees:
        for word in projections:
            if isinstance(projections, Mapping):
                chosen: Sequence[int] = projections[word]
            else:
                chosen = layers if layers is not None else default_layers(one)
            for layer in chosen:
                found |= {site.name: site for site in named_sites(one, layer, word)}
    order = {name: i for i, (name, _) in enumerate(tree.model.named_parameters())}
    sites = sorted(found.values(), key=lambda site: order[site.name])
    if not sites:
        raise LocatorError("`modules` and `layers` name no projection. Give at least one.")
    return sites


def named_sites(tree: ModelTree, layer: int, word: str) -> list[WeightSite]:
    """The projections of a layer that a kind or a name stands for.

    Args:
        tree: The model.
        layer: Index of the block; negative ones count from the end.
        word: ``mlp_in``, ``mlp_out``, ``attention_in``, ``attention_out``, or a projection's own
            name, such as ``up_proj``, with the names of modules around it where that is needed:
            ``mamba.out_proj``.

    Raises:
        LocatorError: If the layer does not exist or has no such projection.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> [site.module_name for site in named_sites(ModelTree.of(tiny_model()), 3, "mlp_in")]
        ['model.layers.3.mlp.gate_proj', 'model.layers.3.mlp.up_proj']
    """
    if word in get_args(ModuleKind):
        found = getattr(tree, word)(layer)
        return [found] if isinstance(found, WeightSite) else list(found)
    names: dict[str, WeightSite] = {}
    for kind in get_args(ModuleKind):
        try:
            one = getattr(tree, kind)(layer)
        except LocatorError:  # such as a block without attention
            continue
        for site in [one] if isinstance(one, WeightSite) else one:
            names[site.module_name.rpartition(".")[2]] = site
    if word in names:
        return [names[word]]
    found = tree.maps_named(layer, word)
    if len(found) != 1:
        several = ", ".join(site.module_name for site in found)
        raise LocatorError(
            f"`modules` names {word!r}, which layer {layer} of {type(tree.model).__name__} "
            + (
                f"has several times: {several}. Name modules around it, too."
                if found
                else f"does not have. Choose from {', '.join((*get_args(ModuleKind), *names))}."
            )
        )
    return found
