# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What all editors have in common: everything Lightning, so that a method is only its method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_edit.checkpoints import PlainCheckpoints, check_editor, record_in
from lightning_edit.core.batch import EditBatch, PromptTokenizer, TemplateValue
from lightning_edit.core.errors import ModelError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.plain_model import check_tokens, check_weights
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.core.request import EditRequest, check_subjects
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.core.wrappers import unwrapped
from lightning_edit.evaluation.evaluator import Evaluator
from lightning_edit.evaluation.measured import Measured
from lightning_edit.metrics import edit_metrics
from lightning_edit.metrics.reading import default_readings
from lightning_edit.modules import protocols, sharded
from lightning_edit.modules.arguments import check_arguments
from lightning_edit.modules.fitting import (
    CommitEdits,
    EditState,
    Fitting,
    Stateful,
    edit_again,
    log_metrics,
    request_rows,
    warn_of_not_taken,
)
from lightning_edit.modules.journal import Journal
from lightning_edit.modules.lending import Lending, check_trainer, loaded
from lightning_edit.modules.protocols import EditProtocol, ProtocolName
from lightning_edit.modules.session import EditSession, requests_in
from lightning_edit.modules.targets import (
    Target,
    WeightTarget,
    check_target,
    no_new_memory,
)
from lightning_edit.modules.unedited import UneditedModel, evaluator_of
from lightning_edit.optim import E, EditOptimizer
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.presets import with_preset

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

__all__ = ["DType", "EditModule", "Journal"]

DType = Literal["auto", "float32", "bfloat16", "float16"]


class EditModule(PlainCheckpoints, LightningModule, ABC, Generic[E]):
    """Base of all editors: a language model, and how to change what it knows.

    A subclass writes one method, ``compute_edit``. It may say where it edits, by
    ``default_layers`` or ``edited_names``, and what, by ``make_target``; it overrides
    nothing else. How ``fit`` works is an object, too: what commits edits, or what
    ``fit_by`` gives in its place. What a method carries from edit to edit goes into the edit,
    and comes back as ``carried`` once that is committed.

    The verbs of the Trainer have editing meanings. ``fit`` commits edits, one optimizer step a
    batch of requests; ``validate`` measures the model as it stands; ``test`` makes edits, measures
    and takes them out again; ``predict`` writes texts before and after.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The method's default when None.
        dtype: Precision of the weights. Edits are computed and added in float32.
        revision: Revision of a hub model.
        chat_template: Ask as a user of a chat model would.
        cache_dir: Folder for converted models and statistics; ``~/.cache/lightning_edit`` if None.
        test_protocol: How ``test`` measures: each request by itself (``independent``), a batch of
            requests at once (``batch``), or all after one another (``sequential``).
        max_new_tokens: Longest continuation that is read by the autoregressive metrics, in tokens.
        chat_template_kwargs: Arguments of the chat template, such as
            ``{"enable_thinking": False}``.
        system_prompt: The system's message before each prompt, in the chat template.
        repeat_requests: Have ``fit`` make the edit of a request again that is in the model already,
            as in a second epoch.
        baseline: Hub id or folder of the model that ``validate`` compares with, where edits are
            in the weights of ``model`` and the editor knows nothing of them.
        measure_in_chat: Measure as a user of a chat model would ask (True), or with bare prompts
            (False), whatever form edits are made in; in that of ``chat_template`` when None.
    """

    #: Address of the paper that describes the method.
    paper: ClassVar[str] = ""
    #: Whether the method needs a model without an encoder.
    decoder_only: ClassVar[bool] = False
    #: Arguments of every editor that this one has no use for, and what to do instead.
    unused_arguments: ClassVar[Mapping[str, str]] = {}
    #: Whether requests must name their subjects.
    needs_subject: bool = False
    #: What ``fit`` works under, which tests try: ``ddp``, ``FSDP2``, ``TP``, ``FSDP2+TP``.
    strategies: ClassVar[tuple[str, ...]] = ("ddp",)

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        dtype: DType = "float32",
        revision: str | None = None,
        chat_template: bool = False,
        cache_dir: str | None = None,
        test_protocol: ProtocolName = "independent",
        max_new_tokens: int = 24,
        chat_template_kwargs: dict[str, TemplateValue] | None = None,
        system_prompt: str | None = None,
        repeat_requests: bool = False,
        baseline: str | None = None,
        measure_in_chat: bool | None = None,
        **unknown: object,
    ) -> None:
        # Subclasses hand on what they do not know, so that the error can name the editor.
        check_arguments(type(self), {"layers": layers, **unknown}, self.unused_arguments)
        super().__init__()
        self.save_hyperparameters(ignore=self.unsaved_arguments)
        self.model_id = model
        self.layers = layers
        self.dtype_name = dtype
        self.revision = revision
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs
        self.system_prompt = system_prompt
        self.cache_dir = cache_dir
        self.test_protocol = test_protocol
        self.max_new_tokens = max_new_tokens
        self.repeat_requests = repeat_requests
        self.measure_in_chat = chat_template if measure_in_chat is None else measure_in_chat
        self.unedited = UneditedModel(baseline)
        self.strict_loading = False  # checkpoints hold only what changed
        self.model: Any = None
        readings = default_readings(self.measure_in_chat)
        self.val_metrics = edit_metrics("val/", readings)
        self.test_metrics = edit_metrics("test/", readings)
        #: Figures of each committed edit, in order: ``id``, ``seconds`` and the method's own.
        self.history: list[RequestFigures] = []
        #: What the last ``validate`` or ``test`` has measured; this process's share.
        self.measured = Measured()
        #: Parts of the editor with something that a resumed run must have.
        self.parts: list[Stateful] = []
        self.fit_by(CommitEdits())
        self._tokens: PromptTokenizer | None = None
        self._session: EditSession[E] | None = None
        self._protocol: EditProtocol[E] | None = None
        self._lending = Lending()

    # -- the method --------------------------------------------------------------------------

    @abstractmethod
    def compute_edit(self, batch: EditBatch) -> E:
        """Computes the edit that answers a batch of requests.

        Called with gradients enabled. Weights may be changed on the way: they are put back.
        """

    def default_layers(self, tree: ModelTree) -> list[int]:
        """Layers to edit where the user names none."""
        return list(range(len(tree.blocks)))

    def edited_names(self, tree: ModelTree) -> list[str]:
        """Names of the parameters that edits may change; the MLP outputs of the layers."""
        layers = sorted({tree.index(layer) for layer in self.layers_of(tree)})
        return [tree.mlp_site(layer).name for layer in layers]

    def make_target(self, tree: ModelTree) -> Target[E]:
        """What is edited in a model: the weights of ``edited_names``.

        Raises before the model is touched where it has no place for the edits.
        """
        return cast(Target[E], WeightTarget(tree.model, self.edited_names(tree)))

    def fit_by(self, fitting: Fitting[E]) -> None:
        """Says how ``fit`` works; by committing edits unless a subclass says otherwise."""
        self.fitting = fitting
        self.automatic_optimization = fitting.automatic

    def layers_of(self, tree: ModelTree) -> list[int]:
        """Layers to edit: those that the user names, or the method's own."""
        return self.layers if self.layers is not None else self.default_layers(tree)

    # -- a model -----------------------------------------------------------------------------

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        preset: str | None = None,
        **settings: Any,
    ) -> Self:
        """An editor of a model that is in memory already.

        Of a compiled or parallel model, or one of peft, it is the model in it that is edited, and
        edits have its names.

        The model stays as it is but for edits that are committed or applied: which parameters get
        gradients, the mode of each module and all else is as it was whenever a call has ended or
        failed, and edits are computed and measured in eval mode whatever that was.

        Args:
            model: A Hugging Face language model. It is edited in place, not copied.
            tokenizer: Its fast tokenizer.
            preset: The model whose settings to take from the method's file in ``configs/method``,
                with a warning where it is another; the class's own defaults, its paper's, if None.
            settings: Further arguments of the editor. They overrule the preset's.

        Raises:
            ValueError: If the method has no such preset.

        Examples:
            >>> from lightning_edit import ROME
            >>> from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
            >>> model = tiny_model()
            >>> editor = ROME.from_model(model, tiny_tokenizer(), layers=[1], steps=3)
            >>> edit = editor.edit(tiny_requests(1))
            >>> edit.apply_(model)
            >>> edit.revert_(model)
        """
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        if preset is not None:
            settings = with_preset(cls.__name__, preset, name, settings)
        module = cls(model=name, **settings)
        module.adopt(model, tokenizer)
        return module

    def adopt(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes a model in memory the one that is edited, in place.

        Args:
            model: A Hugging Face language model.
            tokenizer: Its fast tokenizer.

        Raises:
            ModelError: If the method does not work on such models, weights are quantized or
                offloaded, the pad token is not in the model's embedding, or what wraps the model
                is in the way.
        """
        given, model = model, unwrapped(model)
        check_weights(model)
        tree = ModelTree.of(model)
        if tree.is_encoder_decoder and self.decoder_only:
            raise ModelError(
                f"{type(self).__name__} needs a decoder-only model, but {self.model_id} "
                f"({type(model).__name__}) has an encoder. Choose another method or model."
            )
        self._tokens = PromptTokenizer(
            tokenizer,
            chat_template=self.chat_template or self.measure_in_chat,
            is_encoder_decoder=tree.is_encoder_decoder,
            max_length=getattr(getattr(model, "config", None), "max_position_embeddings", None),
            chat_template_kwargs=self.chat_template_kwargs,
            system_prompt=self.system_prompt,
        ).in_form(self.chat_template)
        check_tokens(model, self._tokens)
        with no_new_memory(model):
            target = self.make_target(tree)
            check_target(target, given)
        self.model = model
        self._session = EditSession(
            model, self._tokens, target, self.model_id, self.revision, self.needs_subject
        )

    @override
    def setup(self, stage: str) -> None:
        sharded.prepare_strategy(self.trainer, self)
        check_trainer(self.trainer, stage)
        self.fitting.check_repeats(self)
        if self.needs_subject and stage != "validate":
            requests = getattr(getattr(self.trainer, "datamodule", None), "requests", ())
            check_subjects((r for r in requests if isinstance(r, EditRequest)), type(self).__name__)
        self.fitting.setup(self.trainer, self, stage)

    @override
    def configure_model(self) -> None:
        """Loads the model once; Lightning calls this before every verb."""
        if self.model is None:
            from lightning_edit.models import load_model, load_tokenizer

            # Lightning would have new tensors on the accelerator, where a seed draws other numbers.
            with torch.device("cpu"):
                model = load_model(
                    self.model_id,
                    revision=self.revision,
                    dtype=self.dtype_name,
                    cache_dir=self.cache_dir,
                    divide=sharded.division_of(self),
                )
                sharded.begin_(self, model)
                self.adopt(model, load_tokenizer(self.model_id, self.revision, self.cache_dir))
        sharded.shard_model(self)
        if self._trainer is not None and self.trainer.state.fn is not None:
            self._lending.begin(self.trainer, self.target)
        is_grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        if is_grouped and not any(p.requires_grad for p in self.parameters()):
            # `ddp` refuses modules that have nothing to train, in a group of one as well.
            self.anchor = nn.Parameter(torch.zeros((), device=self.model.device))

    @property
    def session(self) -> EditSession[E]:
        """The model as it is being edited."""
        return loaded(self._session)

    @property
    def tokens(self) -> PromptTokenizer:
        """The tokenizer, as every method and metric uses it."""
        return loaded(self._tokens)

    @property
    def tree(self) -> ModelTree:
        """Where the model's parts are."""
        return ModelTree.of(self.model)

    @property
    def target(self) -> Target[E]:
        """What is edited in the model."""
        return self.session.target

    @property
    def edit_optimizer(self) -> EditOptimizer[E]:
        """The optimizer that commits edits and knows all that were committed."""
        return self.target.optimizer

    @property
    def delta(self) -> E:
        """All that was committed so far."""
        return self.target.delta

    @property
    def carried(self) -> dict[str, Tensor]:
        """What the last committed edit left for the next one, by name; empty before the first.

        A method reads it in ``compute_edit`` and leaves new tensors in ``edit.carried``, which
        the optimizer takes over with the edit: an edit that is never committed changes no later
        one, one that is taken back takes this back, and a resumed run has it.
        """
        device = self.session.device
        return {name: tensor.to(device) for name, tensor in self.delta.carried.items()}

    @property
    def memory(self) -> EditMemory:
        """The memory of the model, where the editor remembers edits beside the weights."""
        return self.target.memory

    @property
    def base(self) -> BaseModelInfo:
        """The unedited model, with the hash of its weights."""
        return self.session.base

    @property
    def provenance(self) -> Provenance:
        """The editor's part of an edit's provenance."""
        settings = {k: v for k, v in self.hparams.items() if not k.startswith("_")}
        return Provenance(type(self).__name__, self.paper, settings, self.base)

    def base_weights(self) -> AbstractContextManager[None]:
        """Context manager: the unedited model.

        Raises:
            EditError: If something else than the editor wrote to the weights.
        """
        self.target.check()
        return self.target.base_weights()

    def compare_with(self, model: nn.Module) -> None:
        """Has ``validate`` compare with a model in memory, as with the one that ``baseline`` names.

        Args:
            model: A Hugging Face language model with the same tokenizer; it is only run.
        """
        self.unedited.take(model)

    def relative_norm(self) -> float:
        """‖Δ‖ / ‖W‖ over the parameters that edits may change; 0 where there are none."""
        return self.target.relative_norm()

    @property
    def evaluator(self) -> Evaluator:
        """Measures this model, in the form of ``measure_in_chat``."""
        return evaluator_of(self, self.model)

    # -- edits -------------------------------------------------------------------------------

    def edit(self, requests: EditBatch | EditRequest | Sequence[EditRequest]) -> E:
        """Computes an edit and leaves the model as it is.

        Args:
            requests: What to change: one request, several, or a batch made of them.

        Returns:
            The edit; ``apply_`` writes it, ``revert_`` takes it out. Its ``details["requests"]``
            have ``loss``, ``p_target`` and ``took`` of each request in the model with the edit;
            those that did not take are named in a warning.

        Raises:
            RequestError: If the requests contradict each other, or lack a subject that is needed.
            FailedRequestsError: If the method fails on every one of them. Where it fails on some,
                the edit is that of the others, with a warning and the reasons in
                ``edit.details["failed"]``.
        """
        provenance = replace(self.provenance, base=self.session.state)
        edit = self.session.edit(requests, self.compute_edit, provenance)
        self.session.described(edit, requests_in(requests), is_written=False)
        warn_of_not_taken(self, request_rows(edit, edit.provenance.request_ids))
        return edit

    def commit(self, edit: E) -> None:
        """Writes an edit into the model to stay, after all that were committed, as ``fit`` does.

        Args:
            edit: An edit that was made of the model as it stands.

        Raises:
            EditError: If it was made of another state of the model, changes what was not announced,
                something else wrote to the weights, or ``fit`` trains it. Nothing is written then.

        Examples:
            >>> from lightning_edit import ROME
            >>> from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
            >>> editor = ROME.from_model(tiny_model(), tiny_tokenizer(), layers=[1], steps=3)
            >>> editor.commit(editor.edit(tiny_requests(1)))
            >>> editor.committed()
            WeightDelta(model.layers.1.mlp.down_proj.weight: rank 1)
        """
        self.fitting.check_commits(self)
        self.session.check_made_here(edit)
        self.session.commit(edit)
        self.history += request_rows(edit, edit.provenance.request_ids)

    def remove(self, request_ids: Sequence[str]) -> E:
        """Takes requests out of the model, as if they had never been committed.

        Weights go back to the originals, a memory is emptied, and all other requests are edited
        again, in their order and batches, with the editor's settings as they are. That takes as
        long as these edits took; how many there are is logged before the first. An interrupt or an
        error leaves the model as it was. Where processes share the work, each of them calls this.
        A memory of which it is not known what made it all only forgets, with a warning.

        Args:
            request_ids: Ids of the requests.

        Returns:
            The edit by which the model differs now, committed already.

        Raises:
            EditError: If one of them is not in the model, it is not known what made the weights, or
                ``fit`` trained all of them together. The model is as it was then.

        Examples:
            >>> from lightning_edit import ROME
            >>> from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
            >>> editor = ROME.from_model(tiny_model(), tiny_tokenizer(), layers=[1], steps=3)
            >>> for request in tiny_requests(3):
            ...     editor.commit(editor.edit(request))
            >>> _ = editor.remove([tiny_requests(3)[1].id])
            >>> [row["id"] for row in editor.history]
            ['capital-velmora', 'river-dorin']
        """
        self.target.check()
        base, rows = self.session.state, list[RequestFigures]()
        with borrowed(self.model, self.target.trainable):
            edit = self.target.remove(request_ids, lambda batch: edit_again(self, batch, rows))
        edit.provenance = replace(self.provenance, base=base).answering(request_ids, {})
        gone = set(request_ids)
        self.history = rows or [row for row in self.history if row["id"] not in gone]
        return edit

    def committed(self) -> E:
        """All committed edits as one artefact, with originals and hashes for an exact undo."""
        known = tuple(self.fitting.requests.values())
        return self.session.committed(replace(self.provenance, requests=known))

    # -- fit ---------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.fitting.configure_optimizers(self)

    @override
    def training_step(self, batch: list[EditRequest], batch_idx: int) -> Tensor | None:
        return self.fitting.training_step(self, batch)

    @override
    def on_train_start(self) -> None:
        self.fitting.on_train_start(self.trainer, self)

    @override
    def on_train_batch_start(self, batch: list[EditRequest], batch_idx: int) -> None:
        self.fitting.on_train_batch_start(self.trainer, self, batch, batch_idx)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.fitting.on_before_optimizer_step(self.trainer, self, optimizer)

    @override
    def on_train_batch_end(
        self, outputs: STEP_OUTPUT, batch: list[EditRequest], batch_idx: int
    ) -> None:
        self.fitting.on_train_batch_end(self.trainer, self, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self) -> None:
        self.fitting.on_train_epoch_end(self.trainer, self)

    @override
    def on_train_end(self) -> None:
        self.fitting.on_train_end(self.trainer, self)

    # -- measuring ---------------------------------------------------------------------------

    @override
    def on_validation_start(self) -> None:
        self.measured = Measured()

    @override
    def validation_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        if batch := sharded.asked_of_all(self, batch):  # else a process whose share ran out
            self.fitting.validation_step(self, batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self.fitting.log_validation(self)

    @override
    def on_test_start(self) -> None:
        self.measured = Measured()
        self.target.prepare("test")  # a checkpoint has been loaded since
        self._protocol = protocols.make_protocol(self)

    @override
    def test_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        cast(EditProtocol[E], self._protocol).measure(self, sharded.asked_of_all(self, batch))

    @override
    def on_test_epoch_end(self) -> None:
        cast(EditProtocol[E], self._protocol).finish(self)
        log_metrics(self, self.test_metrics)

    @override
    def predict_step(self, batch: list[EditRequest], batch_idx: int) -> list[dict[str, str]]:
        texts = protocols.texts_before_and_after(self, sharded.asked_of_all(self, batch))
        return [row for row in texts if row["id"] in {request.id for request in batch}]

    # -- checkpoints -------------------------------------------------------------------------

    def edit_state(self) -> EditState:
        """What a checkpoint keeps beside the edits, as tensors and primitives."""
        state: EditState = {"history": self.history}
        for part in self.parts:
            state |= part.edit_state()
        return state

    def load_edit_state(self, state: EditState) -> None:
        """Takes over what ``edit_state`` returned in an earlier run."""
        self.history = [row.copy() for row in state["history"]]
        for part in self.parts:
            part.load_edit_state(state)

    def journal(self) -> Journal[E] | None:
        """Keeps what is committed from here on; None where checkpoints hold what was trained."""
        return Journal(self) if isinstance(self.fitting, CommitEdits) else None

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.fitting.kept(self, checkpoint["state_dict"])
        checkpoint["lightning_edit"] = {
            "base_sha256": self.base.sha256,
            "made_by": [type(self).__name__, *self.edit_optimizer.originals],
            "edit_state": self.edit_state(),
        }
        self.fitting.on_save_checkpoint(self.trainer, self, checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = record_in(checkpoint)
        self.configure_model()
        self.session.check_base(saved["base_sha256"])
        check_editor(saved, [type(self).__name__, *self.edit_optimizer.originals])
        self.target.load_kept(checkpoint["state_dict"])
        self.load_edit_state(saved["edit_state"])
        self.fitting.on_load_checkpoint(cast(Trainer, self._trainer), self, checkpoint)
        sharded.restore_edits(self, checkpoint)
