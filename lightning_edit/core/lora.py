# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits as LoRA factors: a change of rank r of a linear map is a LoRA of rank r, exactly."""

# Shapes: R rank, I inputs, O outputs of a linear map, M and N rows and columns as stored.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_edit.core.change import Change
from lightning_edit.core.errors import ArtifactError, some_of

__all__ = ["LoRAFactors", "left_out", "same_rank", "to_lora"]

# Share of a dense change's norm that may be left out where no rank is asked for: rounding only.
ROUNDING = 1e-5


@dataclass(frozen=True)
class LoRAFactors:
    """The change ``B A`` of one linear map, with ``alpha = r``: y = x Wᵀ + x Aᵀ Bᵀ.

    Args:
        a: A, shape [R, I], float32.
        b: B, shape [O, R], float32.
        transposed: Whether the weight is stored as [I, O] (``Conv1D``) rather than [O, I].
        relative_error: ‖Δ − B A‖ / ‖Δ‖ (Frobenius); 0 for factors taken over as they were.
    """

    a: Tensor
    b: Tensor
    transposed: bool
    relative_error: float

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.a.shape[0]


def to_lora(
    changes: Mapping[str, Change], model: nn.Module, rank: int | None = None, *, base: str = ""
) -> dict[str, LoRAFactors]:
    """Turns every change of an edit into LoRA factors.

    Low-rank changes are taken over as they are, dense ones by singular value decomposition.

    Args:
        changes: What an edit changes, by the parameter's name.
        model: A model with the modules that the edit changes; only its module tree is read, so
            it may be on the meta device.
        rank: Largest rank of a module. Changes of a larger one are cut to their largest
            singular values, the best approximation of that rank (Eckart-Young). When None all
            is kept, which takes of dense changes that their rank is small.
        base: Name of the model that the edit was made for, to be told where it does not fit.

    Returns:
        Module name to factors.

    Raises:
        ArtifactError: If the edit changes what is no weight of a linear map (norms, biases,
            embeddings), the model is of another architecture, or a dense change has no small
            rank and ``rank`` is None.

    Examples:
        >>> from lightning_edit.core.change import LowRank
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> changes = {"0.weight": LowRank(torch.ones(2, 1), torch.ones(3, 1))}
        >>> factors = to_lora(changes, model)["0"]
        >>> (factors.b @ factors.a).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]

    References:
        LoRA, arXiv 2106.09685, section 4.1.
    """
    if rank is not None and rank < 1:
        raise ArtifactError(f"`rank` is expected to be at least 1, but got {rank}.")
    modules = _linear_modules(changes, model, base)
    factors = {}
    for name, module in modules.items():
        u_MR, v_NR, error = _factors(name, changes[name], rank)
        transposed = not isinstance(module, nn.Linear)
        b_OR, a_IR = (v_NR, u_MR) if transposed else (u_MR, v_NR)
        factors[name.removesuffix(".weight")] = LoRAFactors(
            a_IR.T.contiguous(), b_OR.contiguous(), transposed, error
        )
    return factors


def same_rank(factors: Mapping[str, LoRAFactors]) -> dict[str, LoRAFactors]:
    """The same changes with the largest rank in every module, the smaller ones filled with zeros.

    Servers that hold several adapters in one buffer read a single rank for all modules.

    Args:
        factors: Module name to factors.

    Examples:
        >>> a, b = (LoRAFactors(torch.ones(r, 3), torch.ones(2, r), False, 0.0) for r in (1, 4))
        >>> same = same_rank({"a": a, "b": b})["a"]
        >>> same.rank, torch.equal(same.b @ same.a, a.b @ a.a)
        (4, True)
    """
    most = max((pair.rank for pair in factors.values()), default=0)
    return {
        name: replace(
            pair,
            a=nn.functional.pad(pair.a, (0, 0, 0, most - pair.rank)),
            b=nn.functional.pad(pair.b, (0, most - pair.rank)),
        )
        for name, pair in factors.items()
    }


def left_out(factors: Mapping[str, LoRAFactors], norms: Mapping[str, float]) -> float:
    """Share of a whole edit's norm that its factors leave out: ‖Δ − B A‖ / ‖Δ‖ over all modules.

    Args:
        factors: Module name to factors.
        norms: ‖Δ‖ (Frobenius) by the parameter's name.

    Examples:
        >>> a = LoRAFactors(torch.ones(1, 1), torch.ones(1, 1), False, 0.5)
        >>> left_out({"a": a, "b": a}, {"a.weight": 3.0, "b.weight": 4.0})
        0.5
    """
    whole = math.hypot(*norms.values())
    missing = [pair.relative_error * norms[f"{name}.weight"] for name, pair in factors.items()]
    return math.hypot(*missing) / whole if whole > 0 else 0.0


def _linear_modules(
    changes: Mapping[str, Change], model: nn.Module, base: str
) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    found, refused = {}, []
    for name, change in changes.items():
        if shapes.get(name) != change.shape:
            has = f"has the shape {list(shapes[name])}" if name in shapes else "does not exist"
            raise ArtifactError(
                f"`{name}` of shape {list(change.shape)}, which the edit changes, {has} in "
                f"{type(model).__name__}. Give the model that the edit was made for, "
                f"{base or 'unknown here'}."
            )
        owner, _, attribute = name.rpartition(".")
        module = modules[owner]
        # Conv1D of transformers is a linear map, too; it knows its outputs as `nf`.
        is_linear = isinstance(module, nn.Linear) or isinstance(getattr(module, "nf", None), int)
        if is_linear and attribute == "weight":
            found[name] = module
        else:
            refused.append(f"`{name}` ({type(module).__name__})")
    if refused:
        raise ArtifactError(
            f"A LoRA adapter holds changes of the weights of linear maps, but the edit changes "
            f"{some_of(refused)} too. Export the whole edited model instead "
            "(`hf`)."
        )
    return found


def _factors(name: str, change: Change, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Factors u, v of at most the rank asked for, and the share of the norm they leave out."""
    if isinstance(change, Tensor):
        left_MK, s_K, right_KN = torch.linalg.svd(change.double(), full_matrices=False)
        whole, kept = change.double(), rank
        if kept is None:
            kept = _whole_rank(name, s_K, change.shape)
    elif rank is None or change.rank <= rank:
        return change.u, change.v, 0.0
    else:
        # (Q_u R_u)(Q_v R_v)ᵀ: only the small R_u R_vᵀ needs decomposing.
        q_MR, r_RR = torch.linalg.qr(change.u.double())
        p_NR, t_RR = torch.linalg.qr(change.v.double())
        x_RK, s_K, y_KR = torch.linalg.svd(r_RR @ t_RR.T)
        left_MK, right_KN = q_MR @ x_RK, y_KR @ p_NR.T
        whole, kept = change.u.double() @ change.v.double().T, rank
    kept = min(kept, len(s_K))
    root_R = s_K[:kept].sqrt()
    u_MR = (left_MK[:, :kept] * root_R).float()
    v_NR = (right_KN[:kept].T * root_R).float()
    norm = torch.linalg.vector_norm(whole)
    missing = torch.linalg.vector_norm(whole - u_MR.double() @ v_NR.double().T)
    return u_MR, v_NR, float(missing / norm) if norm > 0 else 0.0


def _whole_rank(name: str, s_K: Tensor, shape: torch.Size) -> int:
    """The rank that a dense change has but for rounding, where its factors are smaller than it."""
    # tails[r] is the norm of what r terms leave out
    tails = s_K.square().flip(0).cumsum(0).flip(0).sqrt()
    needed = max(1, int((tails > ROUNDING * tails[0]).sum()))
    if needed * sum(shape) >= shape.numel() and needed > 1:
        half = int((tails > 0.5 * tails[0]).sum())
        raise ArtifactError(
            f"The dense change of `{name}` {list(shape)} has the rank {needed}, so that exact "
            f"factors would be larger than the change itself. Give a `rank` to cut it to (rank "
            f"{half} leaves out half of its norm), or export the whole edited model (`hf`)."
        )
    return needed
