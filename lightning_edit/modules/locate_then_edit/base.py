# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What locate-then-edit methods share: context templates, target values, second moments."""

# Shapes: E requests, T templates, D hidden, M inputs of the edited projection.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.errors import ArtifactError, FailedRequestsError, LocatorError
from lightning_edit.core.locator import Locator, ModelTree, WeightSite
from lightning_edit.core.processes import Processes
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.locate_then_edit.second_moment import second_moments
from lightning_edit.modules.locate_then_edit.target_values import (
    LOSSES,
    TargetValues,
    TargetValueSettings,
    optimize_target_values,
)
from lightning_edit.passes.sampling import sample_templates

__all__ = ["LocateModule"]


class LocateModule(EditModule):
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
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].
    """

    decoder_only: ClassVar[bool] = True
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
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        groups = _grouped(context_templates) if context_templates else None
        if "{}" not in kl_prompt:
            raise ValueError(
                f"`kl_prompt` is expected to hold {{}} for the subject, but got {kl_prompt!r}."
            )
        for name, value in (("steps", steps), ("tokens_per_dimension", tokens_per_dimension)):
            if value < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {value}.")
        self.settings = TargetValueSettings(
            steps, lr, weight_decay, clamp_norm_factor, kl_factor, kl_prompt=kl_prompt
        )
        self.second_moment_file = second_moment
        self.second_moment_text = second_moment_text
        is_module = isinstance(second_moment_text, LightningDataModule)
        named = type(second_moment_text).__name__ if is_module else second_moment_text
        self.save_hyperparameters({"second_moment_text": named})
        self.tokens_per_dimension = tokens_per_dimension
        self.ridge = ridge
        self.seed = seed
        self._groups = groups
        self._moments: dict[int, Tensor] = {}

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return [int(len(tree.blocks) / 6 + 0.5)]  # 5 of 28 and of 32, as in the papers' settings

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [site.name for site in self.sites(tree)]

    def sites(self, tree: ModelTree) -> list[WeightSite]:
        """The matrices to edit.

        Raises:
            LocatorError: If a layer does not exist.
        """
        layers = self.layers if self.layers is not None else self.default_layers(tree)
        return Locator(layers=layers).sites(tree.model)

    @property
    def template_groups(self) -> list[list[str]]:
        """Contexts that a prompt is put into; sampled from the unedited model on first use."""
        if self._groups is None:
            with self.base_weights():
                self._groups = self.sample_contexts()
        return self._groups

    @property
    def templates(self) -> list[str]:
        """All context templates; the first is the bare prompt."""
        return [template for group in self.template_groups for template in group]

    def sample_contexts(self) -> list[list[str]]:
        """Contexts from the unedited model, as the papers sample them."""
        if self.groups_contexts:
            sampled = sample_templates(self.model, self.tokens, self.seed, 1, (10,))
            return [["{}"], sampled]
        return [["{}", *sample_templates(self.model, self.tokens, self.seed)]]

    def mean_keys(self, keys: Tensor) -> Tensor:
        """Keys averaged over the templates of each group, then over groups: [..., T, M] → [..., M].

        References:
            arXiv 2210.07229, section 4.3, for groups; arXiv 2202.05262, equation 3, for one.
        """
        groups = self.template_groups
        weights = [1 / (len(groups) * len(group)) for group in groups for _ in group]
        return torch.einsum("...tm,t->...m", keys, torch.tensor(weights, device=keys.device))

    def set_second_moment(self, layer: int, moment: Tensor) -> None:
        """Gives C = E[k kᵀ] of a layer, [M, M], instead of estimating it.

        Raises:
            LocatorError: If the layer is not edited or the shape does not fit.
        """
        sites = {site.layer: site for site in self.sites(self.tree)}
        layer = self.tree.index(layer)
        width = sites[layer].in_features if layer in sites else None
        if tuple(moment.shape) != (width, width):
            raise LocatorError(
                f"A second moment of shape {list(moment.shape)} was given for layer {layer}; "
                f"expected [{width}, {width}] for one of the layers {sorted(sites)}."
            )
        self._moments[layer] = moment.float()

    def second_moment(self, layer: int, processes: Processes | None = None) -> Tensor:
        """C = E[k kᵀ] of a layer of the unedited model, [M, M] float32.

        Args:
            layer: Index of the layer.
            processes: Those that all ask, and share out the work; this one alone if None.
        """
        if layer not in self._moments:
            sites = self.sites(self.tree)
            if self.second_moment_file is not None:
                self._read_second_moments(Path(self.second_moment_file), sites)
            else:
                cache = self.cache_dir or Path.home() / ".cache" / "lightning_edit"
                with self.base_weights():
                    self._moments |= second_moments(
                        self.tree,
                        self.tokens,
                        [site.layer for site in sites],
                        model_hash=self.base.sha256,
                        text=self.second_moment_text,
                        tokens_per_dimension=self.tokens_per_dimension,
                        ridge=self.ridge,
                        seed=self.seed,
                        cache_dir=cache,
                        processes=processes or Processes(),
                    )
        return self._moments[layer].to(next(self.model.parameters()).device)

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
        from safetensors.torch import save_file

        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        moments = {
            site.module_name: self.second_moment(site.layer).cpu().contiguous()
            for site in self.sites(self.tree)
        }
        save_file(moments, file, {"base": self.model_id, "base_sha256": self.base.sha256})
        return file

    def _read_second_moments(self, file: Path, sites: Sequence[WeightSite]) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as stream:
                base = (stream.metadata() or {}).get("base_sha256", "")
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"`second_moment`: cannot read `{file}` ({error}).") from None
        if base and base != self.base.sha256:
            raise ArtifactError(
                f"`second_moment`: `{file}` was made from a model with the weight hash "
                f"{base[:12]}…, but {self.model_id} has {self.base.sha256[:12]}…. Give the second "
                "moments of this model, or none to have them estimated."
            )
        for site in sites:
            if site.module_name not in tensors:
                raise ArtifactError(
                    f"`second_moment`: `{file}` has no tensor `{site.module_name}`. It has "
                    f"{', '.join(sorted(tensors)) or 'none'}."
                )
            self.set_second_moment(site.layer, tensors[site.module_name])

    def find_target_values(
        self, batch: EditBatch, layer: int
    ) -> tuple[EditBatch, TargetValues, dict[str, str]]:
        """Target values of a batch, and of the batch what has one.

        Args:
            batch: Requests.
            layer: The layer whose output changes.

        Returns:
            The requests whose loss stayed finite, their target values, and the ids of the others,
            with the reason of each; see ``failed`` in the details of an edit.

        Raises:
            FailedRequestsError: If there is no target value at all.
        """
        for request in batch.requests:
            times = request.prompt.count(request.subject)
            if times > 1:
                rank_zero_warn(
                    f"Request {request.id!r}: the subject {request.subject!r} occurs {times} times "
                    f"in {request.prompt!r}; the first one is edited. Reword the prompt if another "
                    "is meant."
                )
        if batch.processes.count > 1:
            for site in self.sites(self.tree):
                self.second_moment(site.layer, batch.processes)
        found = self.target_values(batch, layer)
        reasons = {
            batch.requests[e].id: "the loss of its target value is not finite at pass "
            f"{step}. Lower `lr`, or edit this request alone in float32."
            for e, step in found.failed.items()
        }
        if not reasons:
            return batch, found, {}
        if len(reasons) == len(batch.requests):
            raise FailedRequestsError(reasons)
        for id_, why in reasons.items():
            rank_zero_warn(f"Request {id_!r} is left out of its batch: {why}")
        kept = [e for e in range(len(batch.requests)) if e not in found.failed]
        return batch.select(kept), found.select(kept), reasons

    def target_values(self, batch: EditBatch, layer: int) -> TargetValues:
        """Target values of a batch; under several processes each finds those of its share."""
        count, processes = len(batch.requests), batch.processes
        mine = list(processes.share(count))
        tree, tokens = self.tree, self.tokens
        templates = self.templates
        requests = [batch.requests[i] for i in mine]

        def optimize() -> TargetValues:
            return optimize_target_values(
                tree, tokens, layer, requests, templates, self.settings, dtype=batch.pass_dtype
            )

        if processes.count == 1:
            return optimize()
        site = tree.mlp_out(layer)
        device = self.session.device
        found = optimize() if mine else None

        def gathered(part: Tensor | None, *shape: int) -> Tensor:
            return processes.merged(part, (count, *shape), losses)

        width, steps = len(templates), self.settings.steps
        passes = torch.zeros(len(mine), device=device)
        failed = torch.zeros(len(mine), device=device)
        losses = torch.zeros(len(mine), steps, len(LOSSES), device=device)
        if found is not None:
            for i, one in enumerate(found.losses):
                table = [[entry[name] for name in LOSSES] for entry in one]
                losses[i, : len(table)] = torch.tensor(table)
                passes[i] = len(table)
                failed[i] = found.failed.get(i, 0)
        features = site.out_features
        places = 2 if self.settings.place == "sublayers" else 0
        keys = gathered(found.keys if found else None, width, site.in_features)
        outputs = gathered(found.outputs if found else None, width, features)
        deltas = gathered(found.deltas if found else None, features)
        attention = gathered(found.attention if found else None, places, features)
        figures = cast(list[list[list[float]]], gathered(losses, steps, len(LOSSES)).tolist())
        counts = gathered(passes).int().tolist()
        broken = gathered(failed).int().tolist()
        return TargetValues(
            keys,
            outputs,
            deltas,
            attention,
            [
                [dict(zip(LOSSES, row, strict=True)) for row in one[:n]]
                for one, n in zip(figures, counts, strict=True)
            ],
            gathered(torch.tensor(found.probabilities) if found else None).tolist(),
            {e: step for e, step in enumerate(broken) if step},
        )

    @override
    def edit_state(self) -> dict[str, Any]:
        # A resumed run holds an edited model, from which other contexts would be sampled.
        return {**super().edit_state(), "context_templates": self.template_groups}

    @override
    def load_edit_state(self, state: Mapping[str, Any]) -> None:
        super().load_edit_state(state)
        self._groups = _grouped(state["context_templates"])


def _grouped(templates: Sequence[str] | Sequence[list[str]]) -> list[list[str]]:
    """Context templates in groups.

    Raises:
        ValueError: If one does not end where the prompt goes, or the first is not the bare prompt.
    """
    flat = [item for item in templates if isinstance(item, str)]
    groups = [flat] if flat else [[str(template) for template in group] for group in templates]
    if flat and len(flat) < len(templates):
        raise ValueError(
            "`context_templates` is expected to be a list of texts or a list of lists of texts, "
            "but it mixes them. Put every text into a list."
        )
    for template in (template for group in groups for template in group):
        if not template.endswith("{}"):
            raise ValueError(
                f"`context_templates`: {template!r} is expected to end in {{}}, where the "
                "prompt goes, since the target follows it."
            )
    if not all(groups) or groups[0][0] != "{}":
        first = groups[0][0] if groups[0] else groups[0]
        raise ValueError(
            "`context_templates`: the first is expected to be '{}', the bare prompt, in which "
            f"the new value is stored, but got {first!r}. Put '{{}}' before it, and leave no "
            "group empty."
        )
    return groups
