# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Where to edit: transformer blocks and their projections, found in the module tree.

Nothing here knows a model by name. A model is read as what it is built of: a list of alike blocks,
in each block an attention and a multilayer perceptron (MLP), in these the linear maps. Where a
block holds more than these, the model is run to see which of its maps does what.
"""

# Shapes: O outputs of a linear map, I its inputs.

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import LocatorError
from lightning_edit.core.experts import ExpertSite, find_experts
from lightning_edit.core.linear_maps import (
    ATTENTION,
    attention_root,
    holder,
    in_attention,
    linears,
    sizes,
)
from lightning_edit.core.probe import Inner, probed
from lightning_edit.core.sharding import is_sharded
from lightning_edit.core.surroundings import (
    block_stacks,
    hidden_size_of,
    input_embeddings_of,
    is_bare_norm,
    lm_head_of,
    norm_size,
    shared_prefix,
)

__all__ = ["Locator", "MLPSite", "ModelTree", "ModuleKind", "StackKind", "WeightSite"]

ModuleKind = Literal["mlp_out", "mlp_in", "attention_out", "attention_in"]
StackKind = Literal["decoder", "encoder"]

_EMBEDDING = re.compile(r"emb", re.IGNORECASE)


@dataclass(frozen=True)
class WeightSite:
    """One weight matrix of a model: its name, its place and its orientation.

    Args:
        name: Name of the parameter, as in ``model.named_parameters()``.
        module_name: Name of the module that holds it.
        layer: Index of the block it belongs to.
        transposed: Whether the parameter is stored as [I, O] (GPT-2's ``Conv1D``) rather than as
            [O, I] (``nn.Linear``).
        out_features: O.
        in_features: I.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> model = tiny_model("gpt2")
        >>> [site] = Locator(layers=[1]).sites(model)
        >>> site.name, tuple(site.parameter(model).shape), tuple(site.read(model).shape)
        ('transformer.h.1.mlp.c_proj.weight', (128, 32), (32, 128))
    """

    name: str
    module_name: str
    layer: int
    transposed: bool
    out_features: int
    in_features: int

    def parameter(self, model: nn.Module) -> nn.Parameter:
        """The parameter itself, in its own storage layout.

        Raises:
            LocatorError: If the model has no such parameter.
        """
        try:
            return model.get_parameter(self.name)
        except AttributeError:
            raise LocatorError(
                f"{type(model).__name__} has no parameter `{self.name}`. Locate again on this "
                "model: a site belongs to the model, wrappers included, that it was found in."
            ) from None

    def module(self, model: nn.Module) -> nn.Module:
        """The linear module that holds the parameter.

        Raises:
            LocatorError: If the model has no such module.
        """
        self.parameter(model)
        return model.get_submodule(self.module_name)

    def read(self, model: nn.Module) -> Tensor:
        """The weight as [O, I], without gradient.

        A view of the parameter, or a gathered copy where it is a sharded ``DTensor`` (then every
        rank must call).
        """
        return self.orient(_gathered(self.parameter(model).detach()))

    def orient(self, matrix_OI: Tensor) -> Tensor:
        """Turns an [O, I] matrix into the parameter's own layout, and back (an involution)."""
        return matrix_OI.mT if self.transposed else matrix_OI

    # -- as a memory of pairs, as `ExpertSite` is one --------------------------------------

    @property
    def moment_shape(self) -> tuple[int, ...]:
        """Shape of the second moment of keys, [I, I]."""
        return self.in_features, self.in_features

    def among(self, experts: Sequence[int] | None) -> Self:
        """The site itself, which has no experts to choose from.

        Raises:
            LocatorError: If some are named.
        """
        if experts is not None:
            raise LocatorError(
                f"`experts={list(experts)}`, but the MLP of layer {self.layer} is of one piece. "
                "Leave `experts` away, or name layers that are mixtures of experts."
            )
        return self

    def keys(self, model: nn.Module, states: Tensor) -> Tensor:
        """Keys of what enters the module, [n, I]: the same."""
        return states

    def samples(self, model: nn.Module, states: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Keys of what enters the module, with the place of their second moment, the only one."""
        yield (), states

    def kept(self, keys: Tensor) -> Tensor:
        """Keys as far as they may be written at, [..., I]: the same."""
        return keys

    def picked(self, keys: Tensor) -> list[int]:
        """Experts that keys, [..., I], are of: none."""
        return []

    def change(self, u: Tensor, v: Tensor) -> LowRank:
        """The change u vᵀ of the [O, I] matrix, in the parameter's own layout.

        Args:
            u: [O, rank].
            v: [I, rank].
        """
        return LowRank(v, u) if self.transposed else LowRank(u, v)

    def matrix(self, change: Tensor) -> Tensor:
        """A tensor of the parameter's layout as the [O, I] matrix."""
        return self.orient(change)


#: Where an MLP keeps its pairs: one last projection, or those of all experts of a mixture.
MLPSite = WeightSite | ExpertSite

# Sites of experts by block and its name, since the block is run to find them.
_EXPERTS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, int], ExpertSite]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Locator:
    """Where to edit, in words: which layers, which projection of each.

    Args:
        layers: Indices of blocks; negative ones count from the end. All blocks when None.
        module: ``mlp_out`` is the projection back to the hidden state, which stores facts by the
            reading of ROME (arXiv 2202.05262, section 3.1); ``mlp_in`` the projections that read
            it (gate and up projection in gated MLPs); ``attention_out`` and ``attention_in`` the
            same of self-attention.
        stack: Which stack of an encoder-decoder model.

    Raises:
        LocatorError: If an argument is not one of these.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> [site.name for site in Locator(layers=[0, -1]).sites(tiny_model())]
        ['model.layers.0.mlp.down_proj.weight', 'model.layers.3.mlp.down_proj.weight']
    """

    layers: Sequence[int] | None = None
    module: ModuleKind = "mlp_out"
    stack: StackKind = "decoder"

    def __post_init__(self) -> None:
        layers = self.layers
        if layers is not None:
            if isinstance(layers, (str, int)) or not all(type(layer) is int for layer in layers):
                raise LocatorError(
                    f"`layers` is expected to be a list of whole numbers, such as [5], or None "
                    f"for all layers, but got {layers!r}."
                )
            object.__setattr__(self, "layers", tuple(layers))
        for name, kinds in (("module", ModuleKind), ("stack", StackKind)):
            if getattr(self, name) not in get_args(kinds):
                raise LocatorError(
                    f"`{name}` is expected to be one of {', '.join(get_args(kinds))}, but got "
                    f"{getattr(self, name)!r}."
                )

    def sites(self, model: nn.Module) -> list[WeightSite]:
        """The weights this locator means in a model, in the order of the forward pass.

        Raises:
            LocatorError: If a layer does not exist, or holds no such projection.
        """
        tree = ModelTree.of(model, self.stack)
        wanted = range(len(tree.blocks)) if self.layers is None else self.layers
        layers = sorted({tree.index(layer) for layer in wanted})
        find = getattr(tree, self.module)
        sites: list[WeightSite] = []
        for layer in layers:
            found = find(layer)
            sites.extend([found] if isinstance(found, WeightSite) else found)
        return sites


@dataclass(frozen=True, eq=False)
class ModelTree:
    """One stack of transformer blocks of a model, and what stands before and after it.

    Built by ``ModelTree.of``. Layers may be negative in every method.

    Args:
        model: The model it was read from.
        blocks: The transformer blocks, in the order of the forward pass.
        block_names: Their names in the model.
        hidden_size: Width of the hidden state between the blocks.
        is_encoder_decoder: Whether the model has an encoder beside its decoder.
        input_embeddings: The token embedding that feeds this stack.
        final_norm: The normalization after the last block, or None where there is none.
        lm_head: The projection to the vocabulary, or None.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> tree = ModelTree.of(tiny_model())
        >>> len(tree.blocks), tree.hidden_size, tree.block_names[-1]
        (4, 32, 'model.layers.3')
        >>> type(tree.mlp(-1)).__name__, type(tree.final_norm).__name__
        ('LlamaMLP', 'LlamaRMSNorm')
    """

    model: nn.Module
    blocks: list[nn.Module]
    block_names: list[str]
    hidden_size: int
    is_encoder_decoder: bool
    input_embeddings: nn.Module | None
    final_norm: nn.Module | None
    lm_head: nn.Module | None

    @classmethod
    def of(cls, model: nn.Module, stack: StackKind = "decoder") -> Self:
        """Reads a model's module tree.

        Args:
            model: A decoder-only or encoder-decoder language model.
            stack: Which stack of an encoder-decoder model.

        Raises:
            LocatorError: If there is no stack of transformer blocks, or no encoder.
        """
        stacks = block_stacks(model)
        if not stacks:
            raise LocatorError(
                f"{type(model).__name__} has no stack of transformer blocks: expected an "
                "nn.ModuleList of modules that hold linear layers, but found only "
                f"{', '.join(name for name, _ in model.named_children()) or 'a leaf module'}. "
                "Give a language model, without wrappers that hide its layers."
            )
        sides = {
            side: [name for name in stacks if side in name.lower().split(".")]
            for side in ("encoder", "decoder")
        }
        declared = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
        is_encoder_decoder = all(sides.values()) if declared is None else bool(declared)
        embeddings_name, embeddings = input_embeddings_of(model)
        if is_encoder_decoder and sides[stack]:
            candidates = sides[stack]
        elif stack == "encoder":
            raise LocatorError(
                f"`stack='encoder'`, but {type(model).__name__} has no encoder beside its decoder. "
                "Set `stack='decoder'`."
            )
        else:
            candidates = list(stacks)
        # A vision tower or a prediction head is a stack, too: the language model's own is the one
        # with attention that stands nearest to the token embedding.
        name = max(
            candidates,
            key=lambda name: (
                any(ATTENTION.search(n) for n, _ in stacks[name].named_modules()),
                shared_prefix(name, embeddings_name),
                len(stacks[name]),
            ),
        )
        blocks = list(stacks[name])
        parent = model.get_submodule(name.rpartition(".")[0])
        own = [m for m in parent.children() if isinstance(m, nn.Embedding)]
        # Tied encoders and decoders may each call an embedding of their own.
        vocabulary = getattr(embeddings, "num_embeddings", None)
        embeddings = next((m for m in own if m.num_embeddings == vocabulary), embeddings)
        hidden_size = hidden_size_of(blocks[0]) or int(getattr(embeddings, "embedding_dim", 0))
        norms = [
            child
            for child_name, child in parent.named_children()
            if (norm_size(child) == hidden_size or is_bare_norm(child))
            and not _EMBEDDING.search(child_name)
        ]
        return cls(
            model=model,
            blocks=blocks,
            block_names=[f"{name}.{i}" for i in range(len(blocks))],
            hidden_size=hidden_size,
            is_encoder_decoder=is_encoder_decoder,
            input_embeddings=embeddings,
            final_norm=norms[-1] if norms else None,
            lm_head=lm_head_of(model),
        )

    def index(self, layer: int) -> int:
        """The layer counted from the start.

        Raises:
            LocatorError: If there is no such layer.
        """
        count = len(self.blocks)
        if not -count <= layer < count:
            raise LocatorError(
                f"Layer {layer} does not exist: {type(self.model).__name__} has {count} layers. "
                f"Choose from 0 to {count - 1}, or from -{count} to -1 counted from the end."
            )
        return layer % count

    def mlp_out(self, layer: int) -> WeightSite:
        """The MLP's last projection, back to the hidden state.

        Raises:
            LocatorError: If the block has no MLP of this kind, or fused experts in its place.
        """
        layer = self.index(layer)
        self._refuse_experts(layer)
        return self._last(layer, of_attention=False)

    def mlp_site(self, layer: int) -> MLPSite:
        """Where the MLP keeps its pairs: its last projection, or those of all experts.

        Raises:
            LocatorError: If the block has no MLP of this kind, or experts that cannot be told.
        """
        has_experts = bool(self._stacks_of_experts(self.index(layer)))
        return self.expert_site(layer) if has_experts else self.mlp_out(layer)

    def expert_site(self, layer: int) -> ExpertSite:
        """The last projections of all experts of a layer that is a mixture of them.

        Raises:
            LocatorError: If it has none, or they cannot be told.
        """
        layer = self.index(layer)
        stacks = self._stacks_of_experts(layer)
        if not stacks:
            raise LocatorError(
                f"Layer {layer} of {type(self.model).__name__} has no experts. Those that have "
                f"some are {self.mixtures}."
            )
        if is_sharded(self.model):
            raise LocatorError(
                f"Layer {layer} of {type(self.model).__name__} is a mixture of experts that lies "
                "in parts on several processes. Experts are edited whole: run on one device, or "
                "with `strategy='ddp'`."
            )
        known = _EXPERTS.setdefault(self.blocks[layer], {})
        place = (self.block_names[layer], layer)
        if place not in known:
            known[place] = find_experts(self.model, *place, self.hidden_size, stacks)
        return known[place]

    @property
    def mixtures(self) -> list[int]:
        """Layers that are mixtures of experts, as far as these can be told."""
        found = []
        for layer in range(len(self.blocks)):
            if self._stacks_of_experts(layer):
                with suppress(LocatorError):
                    found.append(self.expert_site(layer).layer)
        return found

    def mlp_in(self, layer: int) -> list[WeightSite]:
        """The MLP's projections that read the hidden state; two where it is gated."""
        return self._readers(self.mlp_out(layer))

    def mlp(self, layer: int) -> nn.Module:
        """The module that returns the MLP's output.

        The last projection itself where the MLP's projections stand in the block (OPT, BART), and
        what sends states to experts where it is a mixture.
        """
        if self._stacks_of_experts(self.index(layer)):
            return self.mlp_site(layer).module(self.model)
        return self._container(self.mlp_out(layer))

    def attention_out(self, layer: int) -> WeightSite:
        """The output projection of self-attention.

        Raises:
            LocatorError: If the block has no attention.
        """
        return self._last(self.index(layer), of_attention=True)

    def attention_in(self, layer: int) -> list[WeightSite]:
        """The projections of self-attention that read the hidden state, fused or not."""
        return self._readers(self.attention_out(layer))

    def attention(self, layer: int) -> nn.Module:
        """The self-attention module."""
        return self._container(self.attention_out(layer))

    def maps_named(self, layer: int, name: str) -> list[WeightSite]:
        """Linear maps of a block with a name, or a path that ends with it, whatever they do."""
        found = (n for n, _ in linears(self.blocks[self.index(layer)]))
        return [
            self._site(self.index(layer), n)
            for n in found
            if f".{n.removesuffix('.base_layer')}".endswith(f".{name}")
        ]

    def _last(self, layer: int, *, of_attention: bool) -> WeightSite:
        block = self.blocks[layer]
        found = [name for name in self._writers(block) if in_attention(block, name) == of_attention]
        if of_attention:
            found = self._of_self_attention(layer, found)
        elif found and self._is_mixed:
            found = self._position_wise(layer, found)
        if not found:
            what = "attention" if of_attention else "MLP"
            children = ", ".join(f"`{n}` ({type(m).__name__})" for n, m in block.named_children())
            raise LocatorError(
                f"Layer {layer} (`{self.block_names[layer]}`) of {type(self.model).__name__} has "
                f"no {what} with a linear projection to the hidden size {self.hidden_size}; it "
                f"consists of {children}. Choose another layer or module."
            )
        return self._site(layer, found[-1])

    def _writers(self, block: nn.Module) -> list[str]:
        """Linear maps of a block to the hidden size, by name."""
        return [n for n, one in linears(block) if sizes(one)[0] == self.hidden_size]

    @cached_property
    def _is_mixed(self) -> bool:
        """Whether blocks hold more than attention and one thing beside it, or not all the same."""
        kinds: set[type[nn.Module]] = set()
        for i, block in enumerate(self.blocks):
            if self._experts(i):
                continue
            names = [n for n in self._writers(block) if not in_attention(block, n)]
            holders = {holder(name) for name in names}
            if len(holders) > 1:
                return True
            kinds |= {type(block.get_submodule(name)) for name in holders if name}
        return len(kinds) > 1

    def _position_wise(self, layer: int, names: list[str]) -> list[str]:
        """The one of a block's maps whose input is a curved function of the hidden state alone."""
        seen = self._probed(layer, names)
        found = [n for n, one in seen.items() if one is not None and one.is_of_mlp]
        if not found:
            raise self._unclear(
                layer, names, "has no MLP: what it holds looks at more than one hidden state"
            )
        if len(found) > 1:
            raise self._unclear(layer, found, f"has {len(found)} MLPs")
        return found

    def _of_self_attention(self, layer: int, names: list[str]) -> list[str]:
        """The maps of self-attention, which comes before a decoder's cross-attention, in order."""
        if not names:
            return names
        block = self.blocks[layer]
        root = attention_root(block, names[0])
        own = [n for n, _ in linears(block) if holder(n) == holder(names[0])]
        within = [n for n in names if attention_root(block, n) == root]
        alike = [n for n in names if holder(n) == holder(names[0])]
        if within == alike and own[-1] == alike[-1]:
            return alike
        seen = self._probed(layer, within)
        order = {n: one.order for n, one in seen.items() if one is not None and not one.is_of_mlp}
        return sorted(order, key=order.__getitem__)

    def _probed(self, layer: int, names: list[str]) -> dict[str, Inner | None]:
        maps = [self.blocks[layer].get_submodule(name) for name in names]
        try:
            seen = probed(self.model, self.blocks, self.hidden_size, maps)
        except RuntimeError as reason:
            why = f"cannot be run to see which of its maps does what ({reason})"
            raise self._unclear(layer, names, why) from reason
        return dict(zip(names, seen, strict=True))

    def _unclear(self, layer: int, names: list[str], why: str) -> LocatorError:
        listed = ", ".join(f"`{name}`" for name in names)
        return LocatorError(
            f"Layer {layer} (`{self.block_names[layer]}`) of {type(self.model).__name__} {why}: "
            f"{listed}. Choose another layer; a method with `modules`, such as UltraEdit or "
            f"MEND, which takes one by its name, `modules=[{names[0]!r}]`; or one that edits "
            "none, such as LoRA."
        )

    def _readers(self, out: WeightSite) -> list[WeightSite]:
        block = self.blocks[out.layer]
        own = out.module_name.removeprefix(f"{self.block_names[out.layer]}.")
        names = [n for n, one in linears(block) if n != own and sizes(one)[1] == self.hidden_size]
        found = [name for name in names if holder(name) == holder(own)]
        if not found and in_attention(block, own):
            root = attention_root(block, own)
            found = [name for name in names if attention_root(block, name) == root]
        return [self._site(out.layer, name) for name in found]

    def _container(self, out: WeightSite) -> nn.Module:
        parent = holder(out.module_name)
        name = out.module_name if parent == self.block_names[out.layer] else parent
        return self.model.get_submodule(name)

    def _site(self, layer: int, name: str) -> WeightSite:
        linear = self.blocks[layer].get_submodule(name)
        module_name = f"{self.block_names[layer]}.{name}"
        weight = cast(Tensor, linear.weight)
        if weight.ndim != 2 or not torch.is_floating_point(weight):
            raise LocatorError(
                f"`{module_name}.weight` is {weight.dtype} of shape {list(weight.shape)}: the "
                "model is quantized. Load it unquantized, in float32 or bfloat16."
            )
        out_features, in_features = sizes(linear)
        return WeightSite(
            name=f"{module_name}.weight",
            module_name=module_name,
            layer=layer,
            transposed=not isinstance(linear, nn.Linear),
            out_features=out_features,
            in_features=in_features,
        )

    def _refuse_experts(self, layer: int) -> None:
        experts = self._experts(layer)
        if not experts:
            return
        plain = [i for i in range(len(self.blocks)) if not self._experts(i)]
        advice = f"a layer with a plain MLP ({', '.join(map(str, plain))}), or " if plain else ""
        raise LocatorError(
            f"The MLP of layer {layer} is a mixture of experts: {experts}. One matrix cannot be "
            f"named for all of them. Choose {advice}a method that edits experts, such as ROME, "
            "MEMIT or FineTune, or one that needs none, such as LoRA, or GRACE with "
            "`module='attention_out'`."
        )

    def _stacks_of_experts(self, layer: int) -> list[str]:
        """Names of a block's parameters that hold, of each expert, a matrix from or to D."""
        block, found = self.blocks[layer], []
        for name, parameter in block.named_parameters():
            owner = name.rpartition(".")[0]
            is_kernel = isinstance(block.get_submodule(owner), nn.Conv1d)
            is_stack = parameter.ndim == 3 and min(parameter.shape) > 1
            is_stack &= self.hidden_size in parameter.shape[1:]
            if is_stack and not is_kernel and not in_attention(block, owner):
                found.append(f"{self.block_names[layer]}.{name}")
        return found

    def _experts(self, layer: int) -> str:
        """The experts of a block in words; empty where it has none."""
        block = self.blocks[layer]
        for name in self._stacks_of_experts(layer):
            return f"`{name}` of shape {list(self.model.get_parameter(name).shape)}"
        for name, module in block.named_modules():
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not in_attention(block, name):
                kinds = [type(m) for m in module.children() if any(True for _ in linears(m))]
                if len(kinds) > 1 and len(set(kinds)) == 1:
                    return f"{len(kinds)} modules in `{self.block_names[layer]}.{name}`"
        return ""


def _gathered(weight: Tensor) -> Tensor:
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else cast(Tensor, gather())
