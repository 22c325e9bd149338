# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""LoRA layers of peft around some of a model's linear maps, put in and taken out at will."""

# Shapes: R rank, I inputs, O outputs of a linear map.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import LocatorError, MissingDependencyError, some_of
from lightning_edit.core.locator import Locator, ModelTree, ModuleKind, StackKind, WeightSite
from lightning_edit.core.sharding import (
    lies_in_parts,
    local_shard,
    shard_like,
    split_factors_,
    whole_tensor,
)
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.sampling import seeded

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = ["AdapterLayers", "adapter_sites"]

_NAME = "default"  # of the adapter, as peft names it


class AdapterLayers:
    """One LoRA adapter: y = W x + (alpha/r) B A x for each of some weights, B = 0 at first.

    peft makes the layers; the model is unchanged until ``attach``, and again after
    ``detach``.

    Args:
        model: The language model.
        sites: Weights to adapt.
        rank: Rank r of the factors.
        alpha: The change is scaled by alpha / r.
        seed: Seed of A.

    Raises:
        MissingDependencyError: If peft is not installed.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> model = tiny_model()
        >>> adapter = AdapterLayers(model, adapter_sites(model, [3]), rank=2, alpha=4.0, seed=0)
        >>> with adapter.attached():
        ...     type(model.model.layers[3].self_attn.q_proj).__module__
        'peft.tuners.lora.layer'
        >>> type(model.model.layers[3].self_attn.q_proj).__name__
        'Linear'
        >>> {name: change.rank for name, change in adapter.changes().items()}
        {'model.layers.3.self_attn.q_proj.weight': 2, 'model.layers.3.self_attn.v_proj.weight': 2}

    References:
        LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[WeightSite], *, rank: int, alpha: float, seed: int
    ) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise MissingDependencyError("peft", "peft", "LoRA") from None
        self.model = model
        self.sites = list(sites)
        self.is_attached = False
        # peft wraps what it finds in a module: here the linear maps, without the model.
        holder = nn.ModuleDict({str(i): _whole(model, site) for i, site in enumerate(self.sites)})
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(holder),
            fan_in_fan_out=self.sites[0].transposed,
        )
        # peft freezes what it wraps.
        with seeded(seed), borrowed(holder):
            inject_adapter_in_model(config, holder)
        self.layers: list[LoraLayer] = [holder[str(i)] for i in range(len(self.sites))]
        for site, layer in zip(self.sites, self.layers, strict=True):
            layer.base_layer = site.module(model)
            layer.lora_A.float()
            layer.lora_B.float()
            split_factors_(layer.lora_A[_NAME], layer.lora_B[_NAME], layer.base_layer.weight)
            layer.train(layer.base_layer.training)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of every site, float32."""
        return [
            part[_NAME].weight for layer in self.layers for part in (layer.lora_A, layer.lora_B)
        ]

    def attach(self) -> None:
        """Puts the layers into the model; what is beneath them is called ``base_layer`` then."""
        for layer in self.layers:
            layer.lora_A.to(layer.base_layer.weight.device)
            layer.lora_B.to(layer.base_layer.weight.device)
        self._place(self.layers)
        self.is_attached = True

    def detach(self) -> None:
        """Takes the layers out; the model has its own modules back."""
        self._place([layer.base_layer for layer in self.layers])
        self.is_attached = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Has the layers in the model inside a ``with`` block."""
        self.attach()
        try:
            yield
        finally:
            self.detach()

    def changes(self) -> dict[str, LowRank]:
        """(alpha/r) B A by parameter name, as factors in the parameter's own layout."""
        return {
            site.name: _factors(site, layer)
            for site, layer in zip(self.sites, self.layers, strict=True)
        }

    def base(self) -> dict[str, nn.Parameter]:
        """The weights beneath the layers, by parameter name."""
        return {
            site.name: layer.base_layer.weight
            for site, layer in zip(self.sites, self.layers, strict=True)
        }

    def state(self) -> dict[str, Tensor]:
        """A and B by their names in the model that has the layers in it."""
        return {
            f"{site.module_name}.{part}.{_NAME}.weight": getattr(layer, part)[_NAME].weight
            for site, layer in zip(self.sites, self.layers, strict=True)
            for part in ("lora_A", "lora_B")
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what ``state`` returned.

        Raises:
            LocatorError: If a factor is missing or has another shape.
        """
        for name, parameter in self.state().items():
            if name not in state or state[name].shape != parameter.shape:
                raise LocatorError(
                    f"The adapter has no `{name}` of the shape {list(parameter.shape)}. Use the "
                    "rank, layers and target modules that it was trained with."
                )
            local_shard(parameter.data).copy_(shard_like(parameter, state[name]))

    def _place(self, modules: Sequence[nn.Module]) -> None:
        for site, module in zip(self.sites, modules, strict=True):
            holder, _, child = site.module_name.rpartition(".")
            setattr(self.model.get_submodule(holder), child, module)


def _whole(model: nn.Module, site: WeightSite) -> nn.Module:
    """The module of a weight; where that lies in parts, one of its size, all that peft reads."""
    parameter = site.parameter(model)
    if not lies_in_parts(parameter):
        return site.module(model)
    from transformers.pytorch_utils import Conv1D

    whole = Conv1D(1, 1) if site.transposed else nn.Linear(1, 1, bias=False)
    zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    whole.weight = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
    if isinstance(whole, nn.Linear):
        whole.in_features, whole.out_features = site.in_features, site.out_features
    return whole


def _factors(site: WeightSite, layer: LoraLayer) -> LowRank:
    a_RI = whole_tensor(layer.lora_A[_NAME].weight.detach())
    b_OR = whole_tensor(layer.lora_B[_NAME].weight.detach()) * layer.scaling[_NAME]
    factors = (b_OR.clone(), a_RI.mT.clone())
    u, v = factors[::-1] if site.transposed else factors
    return LowRank(u, v)


def adapter_sites(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    target_modules: Sequence[str] | None = None,
) -> list[WeightSite]:
    """The weights to adapt.

    Args:
        model: A language model.
        layers: Layers of the decoder. All of them if None, those of an encoder too.
        target_modules: Last parts of names of linear maps, such as ``["q_proj", "up_proj"]``. If
            None the query and value projections of self-attention, or what they are fused in.

    Raises:
        LocatorError: If a layer or a name does not exist.
    """
    stacks: list[StackKind] = ["decoder"]
    if layers is None and ModelTree.of(model).is_encoder_decoder:
        stacks = ["encoder", "decoder"]
    kinds: list[ModuleKind] = ["attention_in"]
    if target_modules is not None:
        kinds += ["attention_out", "mlp_in", "mlp_out"]
    sites: list[WeightSite] = []
    missing = set(target_modules or ())
    for kind in kinds:
        found = [s for stack in stacks for s in _sites(model, layers, kind, stack)]
        if target_modules is None:
            return _queries_and_values(found)
        sites += [site for site in found if _last(site) in target_modules]
        missing -= {_last(site) for site in sites}
        if not missing:  # a mixture of experts is not asked for its MLPs without need
            return sites
    raise LocatorError(
        f"`target_modules`: {type(model).__name__} has no linear map named "
        f"{some_of(sorted(missing))} in the attention or MLP of these layers."
    )


def _sites(
    model: nn.Module, layers: Sequence[int] | None, kind: ModuleKind, stack: StackKind
) -> list[WeightSite]:
    """Maps of some layers; without layers, attention's of those that have one."""
    if layers is not None or not kind.startswith("attention"):
        return Locator(layers, kind, stack).sites(model)
    found: list[WeightSite] = []
    reasons: list[LocatorError] = []
    for layer in range(len(ModelTree.of(model, stack).blocks)):
        try:
            found += Locator([layer], kind, stack).sites(model)
        except LocatorError as reason:  # a state space in its place
            reasons.append(reason)
    if reasons and not found:
        raise reasons[0]
    return found


def _queries_and_values(sites: Sequence[WeightSite]) -> list[WeightSite]:
    chosen = [site for site in sites if _last(site)[0] in "qv"]
    # Fused projections are named after all three.
    return chosen if {_last(site)[0] for site in chosen} == {"q", "v"} else list(sites)


def _last(site: WeightSite) -> str:
    return site.module_name.rpartition(".")[2]
