# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The mathematics of KE: a gated gradient."""

# Shapes: N rows, I inputs and O outputs of a projection.

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ke_factors"]


def ke_factors(
    inputs_NI: Tensor, gradients_NO: Tensor, code: Tensor, max_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The factors of ΔW = s σ(η) (∇W ∘ A + B), of rank N + 1.

    With A = softmax(α_a) γ_aᵀ, B = softmax(α_b) γ_bᵀ and ∇W = Σ d uᵀ, the first term is
    Σ (softmax(α_a) ∘ d) (γ_a ∘ u)ᵀ.

    Args:
        inputs_NI: u, [N, I].
        gradients_NO: d, [N, O].
        code: γ_a (I), α_a (O), γ_b (I), α_b (O) and η (1), in this order, [2 (I + O) + 1].
        max_scale: s.

    Returns:
        u [N + 1, O] and v [N + 1, I], with ΔW = uᵀ v; the last row is B.

    Raises:
        ValueError: If the code has another length.

    Examples:
        >>> rows = torch.ones(1, 2)
        >>> u, v = ke_factors(rows, torch.ones(1, 1), torch.zeros(7))
        >>> u.shape, v.shape
        (torch.Size([2, 1]), torch.Size([2, 2]))

    References:
        Editing Factual Knowledge in Language Models, arXiv 2104.08164, section 4.2, equation 4.
    """
    inputs, outputs = inputs_NI.shape[1], gradients_NO.shape[1]
    sizes = [inputs, outputs, inputs, outputs, 1]
    if code.shape != (sum(sizes),):
        raise ValueError(
            f"`code` is expected to be of shape [{sum(sizes)}] for {inputs} inputs and {outputs} "
            f"outputs, but got {list(code.shape)}."
        )
    gamma_a, alpha_a, gamma_b, alpha_b, eta = torch.split(code, sizes)
    gate = max_scale * eta.sigmoid()
    u = torch.cat([alpha_a.softmax(0) * gradients_NO, alpha_b.softmax(0)[None]])
    return gate * u, torch.cat([gamma_a * inputs_NI, gamma_b[None]])
