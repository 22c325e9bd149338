# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which neurons of the MLPs express a fact: attribution, threshold, refinement."""

# Shapes: L layers, M neurons of a layer, S points of the integral, P prompts, R rows, V vocabulary,
# D hidden.

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "ThresholdKind",
    "coarse_neurons",
    "integrated_gradients",
    "integration_points",
    "probability_gradient",
    "refined_neurons",
    "replacement",
]

ThresholdKind = Literal["adaptive", "absolute", "percentile"]


def integration_points(steps: int) -> Tensor:
    """Points α of the Riemann sum, evenly from 0 to 1, both included; only 0 for one step.

    Args:
        steps: Number of points S.

    Returns:
        Points, [S] float32.

    References:
        Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696, equation 5.

    Examples:
        >>> integration_points(3).tolist()
        [0.0, 0.5, 1.0]
    """
    return torch.linspace(0, 1, steps)


def integrated_gradients(activations: Tensor, gradients: Tensor) -> Tensor:
    """Attribution of each neuron: its activation times the mean gradient on the way to it.

    Args:
        activations: The neurons' activations w, [..., M].
        gradients: ∂P/∂w at the points α w, [..., S, M].

    Returns:
        A = w · (1/S) Σ ∂P(α w)/∂w, [..., M] float32.

    References:
        Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696, equation 5.

    Examples:
        >>> integrated_gradients(torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        tensor([ 4., -2.])
    """
    return activations.float() * gradients.float().mean(-2)


def probability_gradient(logits: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Probability of a token and its gradient with respect to the logits.

    Args:
        logits: Logits of rows, [R, V], of any float type.
        token: Id of the token y.

    Returns:
        p_y, [R] float32, and p_y (e_y − p), [R, V] in the type of the logits.

    Examples:
        >>> probability, gradient = probability_gradient(torch.zeros(1, 2), 0)
        >>> probability.tolist(), gradient.tolist()
        ([0.5], [[0.25, -0.25]])
    """
    gradient = torch.softmax(logits.detach().float(), -1)
    probability = gradient[:, token].clone()
    gradient.mul_(-probability[:, None])
    gradient[:, token] += probability
    return probability, gradient.to(logits.dtype)


def coarse_neurons(scores: Tensor, threshold: float, kind: ThresholdKind = "adaptive") -> Tensor:
    """Neurons whose attribution is above a threshold.

    Args:
        scores: Attributions of one prompt, [L, M].
        threshold: For ``adaptive``, share of the largest attribution of all layers; for
            ``absolute``, an attribution; for ``percentile``, percent of neurons to leave out.
        kind: What the threshold means.

    Returns:
        Mask, [L, M] bool.

    References:
        Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696, section 3.3.

    Examples:
        >>> coarse_neurons(torch.tensor([[1.0, 0.1], [0.5, -2.0]]), 0.2).tolist()
        [[True, False], [True, False]]
    """
    if kind == "adaptive":
        limit = threshold * scores.max()
    elif kind == "percentile":
        # torch.quantile takes no more than 16 million values.
        ordered, last = scores.flatten().sort().values, scores.numel() - 1
        place = threshold / 100 * last
        low = min(int(place), last)
        low_value, high_value = ordered[low], ordered[min(low + 1, last)]
        limit = low_value + (place - low) * (high_value - low_value)
    else:
        limit = torch.tensor(threshold, device=scores.device)
    return scores > limit


def refined_neurons(masks: Tensor, share: float) -> Tensor:
    """Neurons that express a fact in more than a share of its prompts.

    Args:
        masks: Neurons found in each prompt, [P, L, M] bool.
        share: Share of prompts that must be exceeded, in [0, 1).

    Returns:
        Mask, [L, M] bool.

    References:
        Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696, section 3.3.

    Examples:
        >>> refined_neurons(torch.tensor([[[True, True]], [[True, False]]]), 0.5).tolist()
        [[True, False]]
    """
    return masks.float().mean(0) > share


def replacement(
    old: Tensor, new: Tensor, activations: Tensor, factor: float, *, signed: bool = True
) -> tuple[Tensor, Tensor]:
    """Change of the neurons' value vectors from the old answer to the new, as u vᵀ.

    Args:
        old: Embedding of the old answer, [D].
        new: Embedding of the new answer, [D].
        activations: Activations of the chosen neurons and 0 of all others, [M].
        factor: How many embeddings are taken away and added.
        signed: Turn the change around where the activation is negative, so that it moves the
            output towards the new answer. Without, the form of the paper, whose neurons are seldom
            negative; those of gated MLPs are so half of the time.

    Returns:
        u = new − old, [D, 1], and v = factor · sign(activation) of the chosen neurons, [M, 1].

    References:
        Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696, section 5.1.

    Examples:
        >>> old, new = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> u, v = replacement(old, new, torch.tensor([0.5, 0.0, -3.0]), factor=2.0)
        >>> u[:, 0].tolist(), v[:, 0].tolist()
        ([-1.0, 1.0], [2.0, 0.0, -2.0])
    """
    signs = activations.float().sign()
    return (new - old).float()[:, None], factor * (signs if signed else signs.abs())[:, None]
