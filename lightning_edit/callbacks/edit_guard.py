# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Takes edits back that do more harm than a budget allows, before anything else sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_edit.callbacks.edit_ledger import EditLedger
from lightning_edit.callbacks.model_access import find_requests
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import EditError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest, is_question
from lightning_edit.evaluation.evaluator import Baseline, Evaluator
from lightning_edit.evaluation.prose import perplexity, read_prose
from lightning_edit.evaluation.side_effects import capabilities
from lightning_edit.functional.matching import autoregressive_hit
from lightning_edit.modules.base import EditModule

__all__ = ["Breach", "EditGuard"]

_SHOWN = 3  # canaries that a message quotes


@dataclass(frozen=True)
class Breach:
    """An edit that was taken back.

    Args:
        step: Number of the optimizer step after which it was measured, from 1.
        request_ids: Ids of its requests, and of those that were edited since the last measurement.
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
    scores: Mapping[str, float] = field(default_factory=dict)


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
    ``guard/growth``, ``guard/<task>/<metric>`` and ``guard/breaches``. Under several processes each
    measures all.

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
        every_n_edits: Measure after so many edits, and after the last. A breach then takes all
            edits back that were made since the last measurement, which the ledger and checkpoints
            have seen meanwhile: they are taken out as by ``editor.remove``.
        text: A UTF-8 file of prose for the perplexity; a page that comes with the package when
            None.
        max_new_tokens: Longest continuation of a canary that is read, in tokens.
        tasks: ``<task>/<metric>`` of lm-eval, such as ``arc_easy/acc``, to the least score, as a
            share of the unedited model's. The more the better must hold of it. Needs the extra
            ``capability``.
        task_limit: Documents of each task; all of them when None.
        task_folder: Folder of further tasks in lm-eval's YAML.

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
        every_n_edits: int = 1,
        tasks: dict[str, float] | None = None,
        task_limit: int | None = None,
        task_folder: str | None = None,
    ) -> None:
        if on_breach not in ("stop", "continue"):
            raise ValueError(f"`on_breach` is {on_breach!r}. Expected `stop` or `continue`.")
        if locality is not None and not 0 <= locality <= 1:
            raise ValueError(f"`locality` is expected to be between 0 and 1, but got {locality}.")
        budgets = {
            "perplexity_ratio": perplexity_ratio,
            "relative_norm": relative_norm,
            "growth": growth,
            **{f"tasks[{name!r}]": share for name, share in (tasks or {}).items()},
        }
        if wrong := [name for name in tasks or {} if "/" not in name]:
            raise ValueError(
                f"`tasks` are expected to be named as task/metric, but got {wrong[0]!r}. Write "
                f"{wrong[0] + '/acc'!r}, if it is accuracy that counts."
            )
        for name, budget in budgets.items():
            if budget is not None and not budget > 0:
                raise ValueError(f"`{name}` is expected to be above 0, but got {budget}.")
        if max_new_tokens < 1:
            raise ValueError(
                f"`max_new_tokens` is expected to be at least 1, but got {max_new_tokens}."
            )
        if every_n_edits < 1 or (dry_run and every_n_edits > 1):
            raise ValueError(
                f"`every_n_edits` is expected to be at least 1, and 1 in a dry run, which measures "
                f"every edit, but got {every_n_edits}."
            )
        self.canaries = canaries
        self.locality = locality
        self.perplexity_ratio = perplexity_ratio
        self.relative_norm = relative_norm
        self.growth = growth
        self.tasks = tasks or {}
        self.task_limit = task_limit
        self.task_folder = task_folder
        self.on_breach = on_breach
        self.dry_run = dry_run
        self.text = read_prose(text)
        self.max_new_tokens = max_new_tokens
        self.every_n_edits = every_n_edits
        #: The edits that were taken back since a budget was broken, also before a run was resumed.
        self.breaches: list[Breach] = []
        #: What was measured after the last edit, by name.
        self.figures: dict[str, float] = {}
        self._editor: EditModule[Edit] | None = None
        self._requests: list[EditRequest] = []
        self._reference = _Reference({}, Baseline({}), math.nan)
        self._before: Edit | None = None
        self._norm = math.nan  # where the edits began that are not measured yet
        self._unmeasured: list[str] = []
        self._step = 0
        self._is_due = True
        self._is_new = False
        self._restored: tuple[list[Breach], list[str], float] = [], [], math.nan
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
        ledgers = _ledgers(trainer)
        if stage == "fit" and self.every_n_edits > 1 and any(one.propose for one in ledgers):
            raise EditError(
                "EditGuard measures several edits together (`every_n_edits`), but "
                "`EditLedger(propose=True)` takes each back at once. Measure after every edit, or "
                "do not propose."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After checkpoints are restored: asks the unedited model, and begins to watch."""
        self._editor = editor = cast("EditModule[Edit]", pl_module)
        self.breaches, self._unmeasured, self._norm = self._restored
        self._restored = [], [], math.nan
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
        is_last = trainer.is_last_batch or self._step == trainer.max_steps
        self._is_due = is_last or self._step % self.every_n_edits == 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Logs what was measured, and ends the run if it is to end."""
        if not self._is_new:
            return
        self._is_new = False
        is_broken = bool(self.breaches) and self.breaches[-1].step == self._step
        if is_broken and self._unmeasured:
            self._take_out(trainer, cast("EditModule[Edit]", pl_module), self.breaches[-1].why)
        self._unmeasured = []
        found = {f"guard/{name}": value for name, value in self.figures.items()}
        found["guard/breaches"] = float(len(self.breaches))
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
        for name, value in found.items():
            pl_module.log(name, value, logger=False, batch_size=1)
        if self.on_breach == "stop" and is_broken:
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
        return {
            "breaches": [{**row, "request_ids": list(row["request_ids"])} for row in rows],
            "unmeasured": list(self._unmeasured),
            "norm": self._norm,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        rows = cast("list[dict[str, object]]", state_dict["breaches"])
        breaches = [
            Breach(
                cast(int, row["step"]),
                tuple(cast("list[str]", row["request_ids"])),
                str(row["why"]),
                cast("dict[str, float]", row["figures"]),
            )
            for row in rows
        ]
        unmeasured = cast("list[str]", state_dict.get("unmeasured", []))
        norm = cast(float, state_dict.get("norm", math.nan))
        self._restored = breaches, unmeasured, norm

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._editor = [], None

    # -- an edit -----------------------------------------------------------------------------

    def _look(self, *_: object) -> None:
        """Before a step: keeps what stands."""
        editor = cast("EditModule[Edit]", self._editor)
        self._before = editor.delta
        if not self._unmeasured and (self.relative_norm is not None or self.growth is not None):
            self._norm = editor.relative_norm()

    def _judge(self, optimizer: Optimizer, *_: object) -> None:
        """After a step: measures, and takes back what broke a budget."""
        editor = cast("EditModule[Edit]", self._editor)
        edit, standing, self._before = editor.edit_optimizer.written, self._before, None
        if edit is None or standing is None:
            return
        requests = edit.answered
        if not self._is_due:
            self._unmeasured += [request.id for request in requests]
            return
        if not requests and not self._unmeasured:
            return  # the method failed on all of them, or a memory forgets something
        exact = torch.autocast(editor.session.device.type, enabled=False)
        try:
            with torch.inference_mode(False), torch.no_grad(), exact:
                rows = editor.session.measured(requests) if requests else {}
                self.figures, broken = self._measure(editor, rows, self._norm)
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
            edit.mark_taken_back(why or "It was taken back, since this was a dry run.")
        if why:
            ids = (*self._unmeasured, *rows)
            self.breaches.append(Breach(self._step, ids, why, self.figures))
            names = ", ".join(map(repr, ids))
            rank_zero_warn(f"EditGuard took back the edit of {names}. {why}")

    def _take_out(self, trainer: Trainer, editor: EditModule[Edit], why: str) -> None:
        """Takes out what was edited before the measured edit, and is in ledger and checkpoint."""
        gone, known = set(self._unmeasured), list(editor.history)
        ledgers = _ledgers(trainer)
        if ledgers:
            ledgers[0].take_out(editor, self._unmeasured, why)
        else:
            editor.remove(self._unmeasured)
        left = {row["id"]: row for row in editor.history}
        editor.history = [
            RequestFigures(id=row["id"], failed=why, took=False)
            if row["id"] in gone and "failed" not in row
            else left.get(row["id"], row)
            for row in known
        ]

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
            self._scores(editor) if self.tasks else {},
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
        if self.tasks:
            scores = self._scores(editor)
            figures |= scores
            for name, share in self.tasks.items():
                before = self._reference.scores[name]
                if not scores[name] >= share * before:
                    broken.append(
                        f"`{name}` is {scores[name]:.4g}, below {share:.4g} of the "
                        f"{before:.4g} that it was."
                    )
        return figures, broken

    def _scores(self, editor: EditModule[Edit]) -> dict[str, float]:
        """What the model scores in the tasks."""
        found = capabilities(
            editor.model,
            editor.evaluator.tokens,
            list(dict.fromkeys(name.rpartition("/")[0] for name in self.tasks)),
            limit=self.task_limit,
            include_path=self.task_folder,
        )
        if missing := [name for name in self.tasks if name not in found]:
            raise EditError(
                f"EditGuard finds no {missing[0]!r} among what the tasks measure: "
                f"{', '.join(found)}. Name one of these in `tasks`."
            )
        return {name: found[name] for name in self.tasks}

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


def _ledgers(trainer: Trainer) -> list[EditLedger]:
    """The ledgers of a run."""
    return [one for one in trainer.callbacks if isinstance(one, EditLedger)]  # type: ignore[attr-defined]


def _listed(figures: Mapping[str, float]) -> str:
    return "".join(f" · {name} {value:.4g}" for name, value in figures.items())
