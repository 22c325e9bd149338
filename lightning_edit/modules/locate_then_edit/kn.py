# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""KN: knowledge neurons, found by attribution and rewritten."""

# Shapes: K neurons of a request, P prompts, L layers, M neurons of a layer, D hidden.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch, PromptTokenizer
from lightning_edit.core.change import Change, LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError, ModelError, RequestError
from lightning_edit.core.locator import Locator, ModelTree, WeightSite
from lightning_edit.core.request import EditRequest, check_subjects
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.functional.knowledge_neurons import (
    ThresholdKind,
    coarse_neurons,
    integrated_gradients,
    integration_points,
    refined_neurons,
    replacement,
)
from lightning_edit.modules.base import EditModule
from lightning_edit.passes.activation_paths import ActivationPaths
from lightning_edit.passes.borrowing import borrowed

__all__ = ["KN", "KnowledgeNeurons", "Operation"]

Operation = Literal["replace", "erase", "suppress", "enhance"]

# What an operation multiplies activations or value vectors by, less one.
_SCALES = {"erase": -1.0, "suppress": -1.0, "enhance": 1.0}


@dataclass(frozen=True)
class KnowledgeNeurons:
    """The neurons that express a fact.

    Args:
        answer: Tokens of the answer that they were found for.
        layers: Layer of each neuron, [K] int64.
        indices: Index of each neuron in its layer, [K] int64.
        scores: Attribution of each in the request's own prompt, [K].
        activations: Activation of each where the answer is predicted, [K].
        attributions: Attributions of all neurons in each prompt, [P, L, M].
    """

    answer: tuple[int, ...]
    layers: Tensor
    indices: Tensor
    scores: Tensor
    activations: Tensor
    attributions: Tensor

    def __len__(self) -> int:
        return len(self.layers)


class KN(EditModule):
    """Knowledge neurons: finds the MLP neurons that express a fact and rewrites their values.

    A neuron is an input of an MLP's last projection; its value vector is the column there. Its
    attribution is A = w · (1/S) Σ ∂P(answer | α w)/∂w over S points α from 0 to 1, at the position
    that predicts, one layer at a time, as the mean over the answer's tokens. The answer is
    ``target_old``, or the token that the model itself gives where a request has none. Neurons
    above the threshold are changed; those of a batch are all found before any is changed.

    There is nothing in it that spares other facts: neurons are shared, and neighbors change too.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers whose neurons are considered; negative ones count from the end. All if None.
        operation: ``replace`` takes the old answer's embedding away from each value vector and
            adds the new one's. ``erase`` sets value vectors to zero, ``suppress`` the activations,
            which is one and the same change of the weights; ``enhance`` doubles them. These three
            do not look at the new answer.
        steps: Points S of the integral. A single one is α = 0.
        threshold: Attribution above which a neuron is taken; see ``threshold_kind``.
        threshold_kind: ``adaptive``: the threshold is a share of the largest attribution of all
            layers. ``absolute``: it is an attribution. ``percentile``: the percent of neurons
            that are left out.
        refine_prompts: Other wordings in which neurons must be found as well: a list with ``{}``
            for the subject, or ``rephrases`` for the request's own, on which generality is
            measured. The prompt alone if None.
        refine_share: Neurons are kept that are above the threshold in more than this share of the
            prompts.
        factor: Embeddings that ``replace`` takes away and adds.
        signed: Turn a replacement around where the activation is negative. Without, the form of
            the paper, which moves such neurons the wrong way; in gated MLPs they are many.
        embeddings: Where the answers' embeddings come from: ``output``, the rows of the projection
            to the vocabulary, or ``input``. The same where the model ties them.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    References:
        Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696, sections 3 and 5.1.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = KN.from_model(*trained_tiny_model(), steps=5)
        >>> edit = editor.edit(tiny_requests(1))
        >>> [found] = edit.details["neurons"]
        >>> len(found) == edit.details["requests"][0]["neurons"] > 0
        True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08696"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        operation: Operation = "replace",
        steps: int = 20,
        threshold: float = 0.2,
        threshold_kind: ThresholdKind = "adaptive",
        refine_prompts: Literal["rephrases"] | list[str] | None = None,
        refine_share: float = 0.5,
        factor: float = 2.0,
        signed: bool = True,
        embeddings: Literal["output", "input"] = "output",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        if steps < 1:
            raise ValueError(f"`steps` is expected to be at least 1, but got {steps}.")
        top = {"adaptive": 1.0, "percentile": 100.0, "absolute": math.inf}[threshold_kind]
        if not 0 <= threshold < top:
            raise ValueError(
                f"`threshold` is expected to be at least 0 and below {top:g} where "
                f"`threshold_kind` is {threshold_kind!r}, but got {threshold}."
            )
        if not 0 <= refine_share < 1:
            raise ValueError(
                f"`refine_share` is expected to be at least 0 and below 1, but got {refine_share}."
            )
        if factor <= 0:
            raise ValueError(f"`factor` is expected to be above 0, but got {factor}.")
        for prompt in [] if isinstance(refine_prompts, str) else refine_prompts or []:
            if "{}" not in prompt:
                raise ValueError(
                    f"`refine_prompts`: {prompt!r} is expected to hold {{}} for the subject."
                )
        self.operation: Operation = operation
        self.steps = steps
        self.threshold = threshold
        self.threshold_kind: ThresholdKind = threshold_kind
        self.refine_prompts = refine_prompts
        self.needs_subject = bool(refine_prompts) and refine_prompts != "rephrases"
        self.refine_share = refine_share
        self.factor = factor
        self.signed = signed
        self.embeddings = embeddings

    def sites(self, tree: ModelTree) -> list[WeightSite]:
        """The matrices whose inputs are the neurons."""
        return Locator(layers=self.layers_of(tree)).sites(tree.model)

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [site.name for site in self.sites(tree)]

    # -- finding -----------------------------------------------------------------------------

    def find(self, request: EditRequest) -> KnowledgeNeurons:
        """Finds the neurons that express what a request is to change, and changes nothing.

        Raises:
            EditError: If no neuron is above the threshold.
            ModelError: If the model is not loaded yet, or cannot be run over cached keys and
                values.
        """
        tokens = self.tokens
        lent = borrowed(self.model)
        with torch.inference_mode(False), torch.enable_grad(), lent:
            return self._find(request, self.tree, tokens)

    def _find(
        self, request: EditRequest, tree: ModelTree, tokens: PromptTokenizer
    ) -> KnowledgeNeurons:
        layers = [site.layer for site in self.sites(tree)]
        points = integration_points(self.steps)
        answer = self._answer_tokens(request, request.target_old or "")
        place = self._place(request, answer)
        attributions: list[Tensor] = []
        activations = torch.empty(0)
        for prompt in self._prompts(request):
            paths = ActivationPaths.capture(tree, tokens.prompt(prompt), answer[:-1])
            if not answer:
                answer = [int(paths.logits[0].argmax())]
                self._place(request, answer)
            scores = []
            for k, token in enumerate(answer):
                found = paths.gradients(k, token, layers, points)
                scores.append(integrated_gradients(found.activations, found.gradients))
                if not attributions and k == place:
                    activations = found.activations.float()
            attributions.append(torch.stack(scores).mean(0))
        whole = torch.stack(attributions)
        masks = [coarse_neurons(one, self.threshold, self.threshold_kind) for one in whole]
        rows, indices = torch.nonzero(
            refined_neurons(torch.stack(masks), self.refine_share), as_tuple=True
        )
        if not len(rows):
            raise EditError(self._none_found(request, whole))
        return KnowledgeNeurons(
            tuple(answer),
            torch.tensor(layers, device=rows.device)[rows],
            indices,
            whole[0][rows, indices],
            activations[rows, indices],
            whole,
        )

    def _prompts(self, request: EditRequest) -> list[str]:
        """The request's prompt and those in which neurons are looked for as well."""
        if self.refine_prompts is None:
            return [request.prompt]
        if isinstance(self.refine_prompts, str):
            return [request.prompt, *request.rephrases]
        check_subjects([request], "`refine_prompts`")
        others = [prompt.replace("{}", request.subject, 1) for prompt in self.refine_prompts]
        return [request.prompt, *others]

    def _answer_tokens(self, request: EditRequest, answer: str) -> list[int]:
        """Tokens of an answer, without the end token; none of an empty one."""
        if not answer:
            return []
        ids = self.tokens.target(request.prompt, answer, request.glued)
        return ids[:-1] if ids[-1] == self.tokens.eos_id and len(ids) > 1 else ids

    def _place(self, request: EditRequest, answer: Sequence[int]) -> int:
        """Index of the first token in which the old and the new answer differ.

        Raises:
            RequestError: If a replacement has nothing to replace.
        """
        if self.operation != "replace" or not answer:
            return 0
        new = self._answer_tokens(request, request.target_new)
        for k, (a, b) in enumerate(zip(answer, new, strict=False)):
            if a != b:
                return k
        old = self.tokens.tokenizer.decode(answer)
        whose = "`target_old`" if request.target_old else "what the model answers"
        raise RequestError(
            f"Edit request {request.id!r}: there is nothing to replace, since {whose}, {old!r}, "
            f"begins like `target_new`, {request.target_new!r}. Give the answer to replace as "
            "`target_old`, or leave the request out."
        )

    def _none_found(self, request: EditRequest, attributions: Tensor) -> str:
        count = len(attributions)
        where = f"in more than {self.refine_share:g} of its {count} prompts " if count > 1 else ""
        return (
            f"Edit request {request.id!r}: no neuron is above the {self.threshold_kind} threshold "
            f"{self.threshold:g} {where}(the largest attribution is "
            f"{float(attributions.max()):.3g}). Lower `threshold`"
            f"{' or `refine_share`' if count > 1 else ''}, or consider more `layers`."
        )

    # -- changing ----------------------------------------------------------------------------

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        tree, requests = self.tree, batch.requests
        neurons = [self.find(request) for request in requests]
        ends: list[tuple[Tensor, Tensor]] = []
        if self.operation == "replace":
            ends = [self._ends(tree, r, n) for r, n in zip(requests, neurons, strict=True)]
        changes: dict[str, Change] = {}
        squares = torch.zeros(len(requests))
        for site in self.sites(tree):
            if not any(bool((found.layers == site.layer).any()) for found in neurons):
                continue
            if self.operation == "replace":
                u, v, norms = self._replacements(site, neurons, ends)
            else:
                u, v, norms = self._scalings(site, neurons)
            squares += norms.cpu() ** 2
            if site.transposed:
                u, v = v, u
            is_small = u.shape[1] * (len(u) + len(v)) < len(u) * len(v)
            changes[site.name] = LowRank(u, v) if is_small else u @ v.T
        edit = WeightDelta(changes)
        edit.details = {
            "neurons": neurons,
            "requests": [
                {
                    "id": request.id,
                    "steps": self.steps,
                    "norm": math.sqrt(float(squares[e])),
                    "neurons": len(neurons[e]),
                }
                for e, request in enumerate(requests)
            ],
        }
        return edit

    def _ends(
        self, tree: ModelTree, request: EditRequest, found: KnowledgeNeurons
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of the old and the new answer, where they differ first, [D] each."""
        module: Any = tree.lm_head if self.embeddings == "output" else tree.input_embeddings
        if module is None:
            raise ModelError(
                f"`embeddings` is {self.embeddings!r}, but {type(tree.model).__name__} has none. "
                "Load it with its language model head, or name the other one."
            )
        weight = whole_tensor(module.weight)
        if weight.shape[1] != tree.hidden_size:
            raise ModelError(
                f"The {self.embeddings} embeddings of {type(tree.model).__name__} have "
                f"{weight.shape[1]} dimensions and its hidden states {tree.hidden_size}, so that "
                "value vectors cannot be made of them. Set another `operation`."
            )
        place = self._place(request, found.answer)
        new = self._answer_tokens(request, request.target_new)
        return weight[found.answer[place]].float(), weight[new[place]].float()

    def _replacements(
        self,
        site: WeightSite,
        neurons: Sequence[KnowledgeNeurons],
        ends: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Change u vᵀ of a matrix, a term of rank one for each request, and the requests' norms."""
        us, vs, norms = [], [], []
        for found, (old, new) in zip(neurons, ends, strict=True):
            here = found.layers == site.layer
            activations = torch.zeros(site.in_features, device=old.device)
            activations[found.indices[here]] = found.activations[here]
            u, v = replacement(old, new, activations, self.factor, signed=self.signed)
            norms.append(u.norm() * v.norm())
            if bool(here.any()):
                us.append(u)
                vs.append(v)
        return torch.cat(us, 1), torch.cat(vs, 1), torch.stack(norms)

    def _scalings(
        self, site: WeightSite, neurons: Sequence[KnowledgeNeurons]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Change u vᵀ that scales columns of a matrix, and the requests' norms."""
        change = _SCALES[self.operation] * site.read(self.model).float()
        indices = [found.indices[found.layers == site.layer] for found in neurons]
        norms = torch.stack([change[:, own].norm() for own in indices])
        # A neuron of two requests is scaled once.
        union = torch.unique(torch.cat(indices))
        ones = torch.zeros(site.in_features, len(union), device=change.device)
        ones[union, torch.arange(len(union), device=change.device)] = 1.0
        return change[:, union], ones, norms
