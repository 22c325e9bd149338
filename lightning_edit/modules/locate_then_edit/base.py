# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What locate-then-edit methods share: context templates, target values, second moments."""

# Shapes: E requests, T templates, D hidden, M inputs of the edited projection.

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, TypeVarTuple

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import MLPSite, ModelTree
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import warn_of_several_places
from lightning_edit.functional.least_squares import factorize
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.locate_then_edit.attention_sink import sink_reasons
from lightning_edit.modules.locate_then_edit.contexts import Contexts
from lightning_edit.modules.locate_then_edit.earlier_edits import EarlierEdits
from lightning_edit.modules.locate_then_edit.moments import MomentSettings, SecondMoments
from lightning_edit.modules.locate_then_edit.reach import unreached
from lightning_edit.modules.locate_then_edit.searches import SearchKind
from lightning_edit.modules.locate_then_edit.shared_search import search_target_values
from lightning_edit.modules.locate_then_edit.target_values import (
    SEARCHES,
    TargetValues,
    TargetValueSettings,
)
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.key_pass import KeyPasses
from lightning_edit.passes.sampling import sample_templates

__all__ = ["LocateModule"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class LocateModule(EditModule[WeightDelta]):
    """Base of editors that store key-value pairs in MLPs.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. A sixth of the way up if None.
        steps: Passes of the optimization of a target value, at most.
        lr: Learning rate of target values.
        weight_decay: Factor of ‖δ‖ / ‖v‖² in the loss of target values.
        clamp_norm_factor: A target value differs from v by at most this factor times ‖v‖.
        kl_factor: Factor of the divergence on the anchor prompt.
        kl_prompt: Anchor prompt; ``{}`` stands for the subject.
        context_templates: Texts that end in ``{}``, where the prompt goes, the first of them
            ``"{}"``. In lists of their own, each list counts as much as another when keys are
            averaged. Sampled from the unedited model when None.
        second_moment: A safetensors file with C = E[k kᵀ] of each layer under the name of the
            projection (such as ``model.layers.7.mlp.down_proj``), as
            ``save_second_moments`` writes it. Estimated when None.
        second_moment_text: A text file, or a data module of texts such as ``TextDataModule``, to
            estimate second moments from; without it the unedited model writes the text itself.
        tokens_per_dimension: Tokens that second moments are estimated from, as a multiple of the
            key's dimensions.
        ridge: Share of the mean eigenvalue added to an estimated second moment's diagonal.
        seed: Seed of sampled contexts and texts.
        stop_loss: Loss in nats below which a target value is found.
        max_rows: Rows whose target values are searched at once; it changes memory, not results.
        search: How target values are searched: ``adam``, as in the papers, or ``gauss_newton``,
            which needs fewer passes; ``lr`` is Adam's alone.
        experts: Indices of the experts that may be changed, where layers are mixtures of experts;
            when None, those that the router picks for the subject.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].
    """

    decoder_only: ClassVar[bool] = True
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")
    needs_subject: bool = True
    unsaved_arguments: ClassVar[tuple[str, ...]] = ("second_moment_text",)
    #: Whether sampled contexts together count as much as the bare prompt.
    groups_contexts: ClassVar[bool] = False

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        steps: int = 20,
        lr: float = 0.5,
        weight_decay: float = 0.5,
        clamp_norm_factor: float = 4.0,
        kl_factor: float = 0.0625,
        kl_prompt: str = "{} is a",
        context_templates: list[str] | list[list[str]] | None = None,
        second_moment: str | None = None,
        second_moment_text: str | LightningDataModule | None = None,
        tokens_per_dimension: int = 4,
        ridge: float = 1e-3,
        seed: int = 0,
        stop_loss: float = 5e-2,
        max_rows: int = 512,
        search: SearchKind = "adam",
        experts: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        if "{}" not in kl_prompt:
            raise ValueError(
                f"`kl_prompt` is expected to hold {{}} for the subject, but got {kl_prompt!r}."
            )
        for name, value in (
            ("steps", steps),
            ("tokens_per_dimension", tokens_per_dimension),
            ("max_rows", max_rows),
        ):
            if value < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {value}.")
        if search not in SEARCHES:
            raise ValueError(
                f"`search` is expected to be one of {', '.join(SEARCHES)}, but got {search!r}."
            )
        self.settings = TargetValueSettings(
            steps,
            lr,
            weight_decay,
            clamp_norm_factor,
            kl_factor,
            stop_loss,
            kl_prompt,
            max_rows,
            search=search,
        )
        self.seed = seed
        self.experts = experts
        is_module = isinstance(second_moment_text, LightningDataModule)
        named = type(second_moment_text).__name__ if is_module else second_moment_text
        self.save_hyperparameters({"second_moment_text": named})
        self.moments = SecondMoments(
            MomentSettings(
                second_moment,
                second_moment_text,
                tokens_per_dimension,
                ridge,
                seed,
                self.cache_dir,
            )
        )
        self.contexts = Contexts(context_templates, self.sample_contexts)
        self.parts.append(self.contexts)

    # -- layers ------------------------------------------------------------------------------

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return [int(len(tree.blocks) / 6 + 0.5)]  # 5 of 28 and of 32, as in the papers' settings

    def sites(self, tree: ModelTree) -> Sequence[MLPSite]:
        """The matrices to edit: of a mixture of experts all at once.

        Raises:
            LocatorError: If a layer does not exist, or has no such experts.
        """
        layers = sorted({tree.index(layer) for layer in self.layers_of(tree)})
        return [tree.mlp_site(layer).among(self.experts) for layer in layers]

    # -- contexts and keys -------------------------------------------------------------------

    @property
    def template_groups(self) -> list[list[str]]:
        """Contexts that a prompt is put into; sampled from the unedited model on first use."""
        return self.contexts.groups

    @property
    def templates(self) -> list[str]:
        """All context templates; the first is the bare prompt."""
        return self.contexts.templates

    def sample_contexts(self) -> list[list[str]]:
        """Contexts from the unedited model, as the papers sample them."""
        with self.target.base_weights():
            if self.groups_contexts:
                return [["{}"], sample_templates(self.model, self.tokens, self.seed, 1, (10,))]
            return [["{}", *sample_templates(self.model, self.tokens, self.seed)]]

    def mean_keys(self, keys: Tensor) -> Tensor:
        """Keys averaged over the templates of each group, then over groups: [..., T, M] → [..., M].

        References:
            arXiv 2210.07229, section 4.3, for groups; arXiv 2202.05262, equation 3, for one.
        """
        return self.contexts.mean_keys(keys)

    def key_passes(self, batch: EditBatch) -> KeyPasses:
        """Passes of a batch in all templates, ready to be asked for the keys of edited layers."""
        layers = [site.layer for site in self.sites(self.tree)]
        rows = self.contexts.subject_rows(self.tokens, batch.requests)
        return KeyPasses.capture(self.tree, layers, rows, self.tokens.pad_id, self.settings.place)

    def layer_keys(self, batch: EditBatch) -> dict[int, Tensor]:
        """Keys of a batch in the model as it stands, [E, M] of each layer."""
        sites = self.sites(self.tree)
        with borrowed(self.model):
            passes = self.key_passes(batch)
            return {s.layer: s.kept(self.mean_keys(passes.keys(s.layer)[0])) for s in sites}

    def remembered(self, layer: int) -> EarlierEdits:
        """What committed edits left at a layer, such as their keys."""
        return EarlierEdits.unpack(self.carried, layer)

    # -- second moments ----------------------------------------------------------------------

    def set_second_moment(self, layer: int, moment: Tensor) -> None:
        """Gives C = E[k kᵀ] of a layer, [M, M], instead of estimating it.

        What was made of an earlier one is made anew.

        Raises:
            LocatorError: If the layer is not edited or the shape does not fit.
            ArtifactError: If the matrix is not finite, not symmetric, or has a negative diagonal.
        """
        self.moments.give(self.sites(self.tree), self.tree.index(layer), moment)

    def second_moment(self, layer: int, processes: Processes | None = None) -> Tensor:
        """C = E[k kᵀ] of a layer of the unedited model, [M, M] float32; of experts, each one's.

        Args:
            layer: Index of the layer.
            processes: Those that all ask, and share out the work; this one alone if None.
        """
        tree = self.tree
        return self.moments.of(self.session, self.sites(tree), tree.index(layer), processes)

    def from_second_moment(
        self,
        layer: int,
        make: Callable[[Tensor, *Ts], T],
        *arguments: *Ts,
    ) -> T:
        """What a function makes of the second moment of a layer; kept for as long as that is.

        Args:
            layer: Index of the layer.
            make: The function; it is given C first.
            arguments: Its further arguments.

        Raises:
            ArtifactError: If the second moment does not allow it.
        """
        self.moments.find(self.session, self.sites(self.tree), self.tree.index(layer))
        return self.moments.derived(self.session, self.tree.index(layer), make, *arguments)

    def factor(self, layer: int) -> Tensor:
        """Cholesky factor of the layer's second moment, [M, M] float64; of experts, each one's.

        Raises:
            ArtifactError: If the second moment is singular.
        """
        return self.from_second_moment(layer, factorize)

    def save_second_moments(self, file: str | Path) -> Path:
        """Writes the second moments of the edited layers, to be given as ``second_moment``.

        Args:
            file: A ``.safetensors`` file. It records which weights it belongs to, and is refused
                for others.

        Examples:
            >>> from lightning_edit import ROME
            >>> from lightning_edit.demos import tiny_model, tiny_tokenizer
            >>> editor = ROME.from_model(tiny_model(), tiny_tokenizer(), layers=[1])
            >>> file = editor.save_second_moments(getfixture("tmp_path") / "moments.safetensors")
            >>> again = ROME.from_model(
            ...     tiny_model(), tiny_tokenizer(), layers=[1], second_moment=str(file)
            ... )
            >>> bool((again.second_moment(1) == editor.second_moment(1)).all())
            True
        """
        return self.moments.save(self.session, self.sites(self.tree), Path(file))

    # -- target values -----------------------------------------------------------------------

    def find_target_values(
        self, batch: EditBatch, layer: int
    ) -> tuple[EditBatch, TargetValues, dict[str, str]]:
        """Target values of a batch, and of the batch what has one.

        Args:
            batch: Requests.
            layer: The layer whose output changes.

        Returns:
            The requests that can be written, their target values, and the ids of the others with
            the reason of each; see ``failed`` in the details of an edit.

        Raises:
            FailedRequestsError: If there is no target value at all.
        """
        warn_of_several_places(batch.requests)
        if batch.processes.count > 1:
            for site in self.sites(self.tree):
                self.moments.find(self.session, self.sites(self.tree), site.layer, batch.processes)
        reasons = sink_reasons(self.tree, self.tokens, batch.requests, layer)
        asked = batch if not reasons else batch.without(reasons)
        found = self.target_values(asked, layer)
        [site] = [site for site in self.sites(self.tree) if site.layer == layer]
        why = unreached(site, found.keys[:, 0]) | {
            e: f"the loss of its target value is not finite at pass {step}. Lower `lr`, or edit "
            "this request alone in float32."
            for e, step in found.failed.items()
        }
        kept = [e for e in range(len(asked.requests)) if e not in why]
        reasons |= {asked.requests[e].id: reason for e, reason in why.items()}
        if not reasons:
            return batch, found, {}
        left = batch.without(reasons)
        for id_, reason in reasons.items():
            rank_zero_warn(f"Request {id_!r} is left out of its batch: {reason}")
        return left, found.select(kept), reasons

    def target_values(self, batch: EditBatch, layer: int) -> TargetValues:
        """Target values of a batch; under several processes each finds those of its share."""
        return search_target_values(
            self.tree,
            self.tokens,
            layer,
            batch.requests,
            self.templates,
            self.settings,
            processes=batch.processes,
            dtype=batch.pass_dtype,
        )
