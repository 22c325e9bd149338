# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Takes edits back that do more harm than a budget allows, before anything else sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_edit.callbacks.model_access import find_requests
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import EditError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest, is_question
from lightning_edit.evaluation.evaluator import Baseline, Evaluator
from lightning_edit.evaluation.prose import perplexity, read_prose
from lightning_edit.functional.matching import autoregressive_hit
from lightning_edit.modules.base import EditModule

__all__ = ["Breach", "EditGuard"]

_SHOWN = 3  # canaries that a message quotes


@dataclass(frozen=True)
class Breach:
    """An edit that was taken back.

    Args:
        step: Number of the optimizer step that wrote it, from 1.
        request_ids: Ids of its requests.
        why: Each budget that it broke, with what was measured.
        figures: What was measured, by name.
    """

    step: int
    request_ids: tuple[str, ...]
    why: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reference:
    """What the unedited model says."""

    answers: Mapping[str, str]
    baseline: Baseline
    perplexity: float


class EditGuard(CheckedArguments, Callback):
    """Measures the model after each edit, and takes the edit back if a budget is broken.

    An edit is what one batch of requests was answered by. Taken back, it leaves the model bit for
    bit as it was: its weights, its memory, and what the method goes on from. Its requests count as
    failed, with the reason, in ``history``, in the report, and in the ledger of an
    [`EditLedger`][lightning_edit.EditLedger] of the same Trainer, which has a row of the kind
    ``rollback``; no checkpoint holds it. A budget of None is not measured; answers to the edit's
    own requests that are not finite are always a breach. An edit that is itself not finite is never
    written, with or without a guard: it ends the run with an error.

    Figures go to the loggers and to ``trainer.callback_metrics`` as ``guard/canaries`` (share that
    kept its answers), ``guard/locality``, ``guard/perplexity_ratio``, ``guard/relative_norm``,
    ``guard/growth`` and ``guard/breaches``. Under several processes each measures all.

    Works with editors whose edits ``fit`` commits one by one. What Lightning's loop trains is no
    edit before its end, and is refused.

    Args:
        canaries: Prompts whose greedy continuations must stay those of the unedited model, or
            prompts with the answers that must be kept, which the unedited model has to give.
        locality: Least share of tokens, in [0, 1], on which the edited model agrees with the
            unedited one after the locality prompts of the requests that are in it, under teacher
            forcing.
        perplexity_ratio: Highest perplexity on prose, as a multiple of the unedited model's.
        relative_norm: Highest ‖Δ‖/‖W‖ over the weights that edits may change. A memory changes
            none.
        growth: By how much ‖Δ‖/‖W‖ may grow with one edit.
        on_breach: ``stop`` ends the run after it has taken the edit back, with all that the end of
            a run has; ``continue`` goes on with the next batch.
        dry_run: Take every edit back once it was measured, and say what it would have changed.
        text: A UTF-8 file of prose for the perplexity; a page that comes with the package when
            None.
        max_new_tokens: Longest continuation of a canary that is read, in tokens.

    Raises:
        ValueError: If a budget is out of its range.

    Examples:
        >>> EditGuard(["The capital of France is"], perplexity_ratio=1.1).breaches
        []
    """

    def __init__(
        self,
        canaries: list[str] | dict[str, str] | None = None,
        locality: float | None = None,
        perplexity_ratio: float | None = None,
        relative_norm: float | None = None,
        growth: float | None = None,
        on_breach: Literal["stop", "continue"] = "stop",
        dry_run: bool = False,
        text: str | None = None,
        max_new_tokens: int = 24,
    ) -> None:
        if on_breach not in ("stop", "continue"):
            raise ValueError(f"`on_breach` is {on_breach!r}. Expected `stop` or `continue`.")
        if locality is not None and not 0 <= locality <= 1:
            raise ValueError(f"`locality` is expected to be between 0 and 1, but got {locality}.")
        budgets = {
            "perplexity_ratio": perplexity_ratio,
            "relative_norm": relative_norm,
            "growth": growth,
        }
        for name, budget in budgets.items():
            if budget is not None and not budget > 0:
                raise ValueError(f"`{name}` is expected to be above 0, but got {budget}.")
        if max_new_tokens < 1:
            raise ValueError(
                f"`max_new_tokens` is expected to be at least 1, but got {max_new_tokens}."
            )
        self.canaries = canaries
        self.locality = locality
        self.perplexity_ratio = perplexity_ratio
        self.relative_norm = relative_norm
        self.growth = growth
        self.on_breach = on_breach
        self.dry_run = dry_run
        self.text = read_prose(text)
        self.max_new_tokens = max_new_tokens
        #: The edits that were taken back since a budget was broken, also before a run was resumed.
        self.breaches: list[Breach] = []
        #: What was measured after the last edit, by name.
        self.figures: dict[str, float] = {}
        self._editor: EditModule[Edit] | None = None
        self._requests: list[EditRequest] = []
        self._reference = _Reference({}, Baseline({}), math.nan)
        self._before: tuple[Edit, float] | None = None
        self._step = 0
        self._is_new = False
        self._restored: Sequence[Breach] = ()
        self._handles: list[RemovableHandle] = []

    # -- a run -------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses modules that commit no edits one by one."""
        if stage == "fit" and (
            not isinstance(pl_module, EditModule) or pl_module.automatic_optimization
        ):
            raise EditError(
                f"EditGuard cannot take back what {type(pl_module).__name__} learns: its steps are "
                "no edits, which are there one by one. Take an editor that commits edits, such as "
                "ROME, MEMIT, FineTune or GRACE, or leave the guard out and measure with "
                "`EditEvaluator` and `RetentionCurve`."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After checkpoints are restored: asks the unedited model, and begins to watch."""
        self._editor = editor = cast("EditModule[Edit]", pl_module)
        self.breaches, self._restored = list(self._restored), ()
        self.figures, self._is_new = {}, False
        self._requests = []
        if self.locality is not None:
            self._requests = find_requests(trainer, None, "EditGuard")
            if not any(request.locality for request in self._requests):
                raise EditError(
                    "EditGuard has nothing to hold `locality` against: none of the requests has "
                    "locality probes. Give them some, or leave `locality` out and name `canaries`."
                )
        with editor.base_weights():
            self._reference = self._ask(editor)
        optimizer = editor.edit_optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._look),
            optimizer.register_step_post_hook(self._judge),
        ]

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Counts the step that comes."""
        self._step = trainer.global_step + 1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Logs what was measured, and ends the run if it is to end."""
        if not self._is_new:
            return
        self._is_new = False
        found = {f"guard/{name}": value for name, value in self.figures.items()}
        found["guard/breaches"] = float(len(self.breaches))
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
        for name, value in found.items():
            pl_module.log(name, value, logger=False, batch_size=1)
        if self.on_breach == "stop" and self.breaches and self.breaches[-1].step == self._step:
            trainer.should_stop = True
            rank_zero_info("EditGuard ends the run. `on_breach='continue'` would go on.")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what came of it."""
        count = len(self.breaches)
        rank_zero_info(f"Guard  {count or 'no'} edit(s) taken back{_listed(self.figures)}")
        self._stop()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Watches no longer."""
        self._stop()

    @override
    def state_dict(self) -> dict[str, object]:
        rows = [asdict(breach) for breach in self.breaches]
        return {"breaches": [{**row, "request_ids": list(row["request_ids"])} for row in rows]}

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        rows = cast("list[dict[str, object]]", state_dict["breaches"])
        self._restored = [
            Breach(
                cast(int, row["step"]),
                tuple(cast("list[str]", row["request_ids"])),
                str(row["why"]),
                cast("dict[str, float]", row["figures"]),
            )
            for row in rows
        ]

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._editor = [], None

    # -- an edit -----------------------------------------------------------------------------

    def _look(self, *_: object) -> None:
        """Before a step: keeps what stands."""
        editor = cast("EditModule[Edit]", self._editor)
        is_bounded = self.relative_norm is not None or self.growth is not None
        self._before = editor.delta, editor.relative_norm() if is_bounded else math.nan

    def _judge(self, optimizer: Optimizer, *_: object) -> None:
        """After a step: measures, and takes back what broke a budget."""
        editor = cast("EditModule[Edit]", self._editor)
        edit, before, self._before = editor.edit_optimizer.written, self._before, None
        if edit is None or before is None:
            return
        requests = _requests(edit)
        if not requests:
            return  # the method failed on all of them, or a memory forgets something
        standing, norm = before
        exact = torch.autocast(editor.session.device.type, enabled=False)
        try:
            with torch.inference_mode(False), torch.no_grad(), exact:
                rows = editor.session.measured(requests)
                self.figures, broken = self._measure(editor, rows, norm)
            told = Processes.running().objects(broken)
            if self.dry_run:
                self._tell(edit, rows, editor)
        except BaseException:  # an interruption, too, leaves nothing that was not measured
            editor.edit_optimizer.rewind(standing)
            raise
        self._is_new = True
        why = " ".join(dict.fromkeys(reason for part in told for reason in part))
        if why or self.dry_run:
            editor.edit_optimizer.rewind(standing)
            _mark(edit, why or "It was taken back, since this was a dry run.")
        if why:
            self.breaches.append(Breach(self._step, tuple(rows), why, self.figures))
            names = ", ".join(map(repr, rows))
            rank_zero_warn(f"EditGuard took back the edit of {names}. {why}")

    def _tell(
        self, edit: Edit, rows: Mapping[str, RequestFigures], editor: EditModule[Edit]
    ) -> None:
        """Says what an edit would have changed."""
        weights = editor.target.parameters
        size = sum(p.numel() for p in weights.values())
        where = f" · {len(weights)} tensors of {size:,} parameters" if weights else ""
        scores = ", ".join(
            f"{id_!r} p(target) {row['p_target']:.3f}" + (" took" if row["took"] else " not taken")
            for id_, row in rows.items()
        )
        rank_zero_info(
            f"Dry run  {edit!r}{where} · {edit.nbytes:,} bytes · ‖Δ‖ {edit.norm():.4g} · "
            f"{scores}{_listed(self.figures)}"
        )

    # -- measuring ---------------------------------------------------------------------------

    def _ask(self, editor: EditModule[Edit]) -> _Reference:
        """What the model says, which is unedited."""
        evaluator = self._evaluator(editor)
        prompts = list(self.canaries or ())
        answers = dict(zip(prompts, evaluator.continuations(prompts), strict=True))
        if isinstance(self.canaries, dict):
            for prompt, answer in self.canaries.items():
                if not autoregressive_hit(is_question(prompt), answers[prompt], [answer]):
                    raise EditError(
                        f"The unedited model does not answer the canary {prompt!r} with "
                        f"{answer!r}, but with {answers[prompt].strip()!r}, so that no edit could "
                        "keep it. Give the model's own answer, or the prompt alone."
                    )
        return _Reference(
            answers,
            evaluator.baseline(self._requests),
            math.nan
            if self.perplexity_ratio is None
            else perplexity(editor.model, evaluator.tokens, self.text),
        )

    def _measure(
        self, editor: EditModule[Edit], rows: Mapping[str, RequestFigures], norm_before: float
    ) -> tuple[dict[str, float], list[str]]:
        """What the edited model comes to, and the budgets that are broken, in words."""
        figures: dict[str, float] = {}
        broken: list[str] = []
        if wild := [id_ for id_, row in rows.items() if not math.isfinite(row["loss"])]:
            names = ", ".join(map(repr, wild))
            broken.append(f"What the edited model answers to {names} is not finite.")
        weights = editor.target.originals
        if weights and not math.isnan(norm_before):
            norm = editor.relative_norm()
            figures |= {"relative_norm": norm, "growth": norm - norm_before}
            for name, budget in (("relative_norm", self.relative_norm), ("growth", self.growth)):
                if budget is not None and not figures[name] <= budget:
                    broken.append(f"`{name}` is {figures[name]:.4g}, above {budget:.4g}.")
        evaluator = self._evaluator(editor)
        if self.canaries:
            lost = self._lost(evaluator)
            figures["canaries"] = 1 - len(lost) / len(self.canaries)
            more = f" {len(lost) - _SHOWN} more are like it." if len(lost) > _SHOWN else ""
            broken += [*lost[:_SHOWN], *([more.strip()] if more else [])]
        if self.locality is not None:
            made = set(editor.target.request_ids)
            asked = [request for request in self._requests if request.id in made]
            probes = evaluator.evaluate(asked, self._reference.baseline).probes
            known = [
                p.teacher_forced
                for p in probes
                if p.metric == "locality" and p.teacher_forced is not None
            ]
            if known:
                figures["locality"] = share = math.fsum(known) / len(known)
                if not share >= self.locality:
                    broken.append(f"`locality` is {share:.4g}, below {self.locality:.4g}.")
        if self.perplexity_ratio is not None:
            now = perplexity(editor.model, evaluator.tokens, self.text)
            figures["perplexity_ratio"] = ratio = now / self._reference.perplexity
            if not ratio <= self.perplexity_ratio:
                broken.append(
                    f"`perplexity_ratio` is {ratio:.4g}, above {self.perplexity_ratio:.4g}."
                )
        return figures, broken

    def _lost(self, evaluator: Evaluator) -> list[str]:
        """The canaries that are answered otherwise, in words."""
        before = self._reference.answers
        lost = []
        for prompt, text in zip(before, evaluator.continuations(list(before)), strict=True):
            if isinstance(self.canaries, dict):
                answer = self.canaries[prompt]
                is_kept = autoregressive_hit(is_question(prompt), text, [answer])
            else:
                answer = before[prompt].strip()
                is_kept = text.strip() == answer
            if not is_kept:
                lost.append(
                    f"The canary {prompt!r} was answered with {answer!r}, and is now with "
                    f"{text.strip()!r}."
                )
        return lost

    def _evaluator(self, editor: EditModule[Edit]) -> Evaluator:
        return Evaluator(
            editor.model,
            editor.evaluator.tokens,
            readings=["teacher_forced"],
            max_new_tokens=self.max_new_tokens,
        )


def _requests(edit: Edit) -> list[EditRequest]:
    """The requests that an edit answers."""
    failed = edit.details.get("failed", {})
    asked = [request for batch in edit.batches if batch for request in batch.requests]
    return [request for request in asked if request.id not in failed]


def _listed(figures: Mapping[str, float]) -> str:
    return "".join(f" · {name} {value:.4g}" for name, value in figures.items())


def _mark(edit: Edit, why: str) -> None:
    """Has the requests of an edit that was taken back count as failed."""
    failed = {request.id: why for request in _requests(edit)}
    edit.details["failed"] = {**edit.details.get("failed", {}), **failed}
    edit.details["requests"] = []
    edit.details["taken_back"] = why
