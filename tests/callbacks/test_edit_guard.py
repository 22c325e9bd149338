# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""An edit that breaks a budget is taken back, bit for bit, and everything beside it knows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from lightning_edit import (
    EditCheckpoint,
    EditDataModule,
    EditEvaluator,
    EditGuard,
    EditLedger,
    EditReport,
    EditRequest,
    FullTuning,
    Ledger,
)
from lightning_edit.callbacks import edit_guard
from lightning_edit.core.errors import EditError, SettingError
from lightning_edit.demos import tiny_requests
from tests.callbacks.foreign import data_of, foreign
from tests.callbacks.own_task import write_own_task
from tests.contract.enumeration import CONFIGS, EDITORS, quick_editor
from tests.modules.helpers import bare_trainer, fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:EditGuard:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*edits did not take:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*dirpath.*exists and is not empty:UserWarning"),
]

# One of each kind of what is edited, and of what is carried on; `make test-slow` asks the others.
QUICK = ("AlphaEdit", "GRACE", "IKE", "LoRA", "ROME", "WISE")
METHODS = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EDITORS
]
FIRST, SECOND, THIRD = tiny_requests(3)


class Breaks(EditGuard):
    """Finds fault with the edits of the requests that it is told."""

    def __init__(self, ids: Sequence[str] = (SECOND.id,), **settings: Any) -> None:
        super().__init__(**settings)
        self.ids = set(ids)

    def _measure(self, editor: Any, rows: Any, norm_before: float) -> Any:
        figures, broken = super()._measure(editor, rows, norm_before)
        bad = self.ids & set(editor.target.request_ids)
        return figures, [*broken, *(f"{name} is bad." for name in sorted(bad))]


def fit(
    editor: Any, guard: Any, *callbacks: Callback, requests: Any = None, **settings: Any
) -> Trainer:
    ckpt = settings.pop("ckpt_path", None)
    keeps = any(isinstance(c, EditCheckpoint) for c in callbacks)
    guards = [] if guard is None else [guard]
    trainer = bare_trainer(
        callbacks=[*guards, *callbacks],
        enable_checkpointing=keeps,
        **{"max_epochs": 1, **settings},
    )
    data = EditDataModule(requests=requests or [FIRST, SECOND, THIRD])
    trainer.fit(editor, data, ckpt_path=ckpt, weights_only=bool(ckpt))
    return trainer


@pytest.mark.parametrize("name", METHODS)
def test_what_is_taken_back_was_never_there(name: str) -> None:
    editor, without = quick_editor(EDITORS[name]), quick_editor(EDITORS[name])
    guard = Breaks(on_breach="continue")
    if editor.automatic_optimization:
        with pytest.raises(EditError, match=rf"cannot take back what {name} learns"):
            fit(editor, guard)
        assert fingerprint(editor.model) == fingerprint(without.model)
        return
    trainer = fit(editor, guard)
    fit(without, None, requests=[FIRST, THIRD])
    assert fingerprint(editor.model) == fingerprint(without.model)
    assert list(editor.delta.provenance.request_ids) == [FIRST.id, THIRD.id]
    [breach] = guard.breaches
    assert (breach.step, breach.request_ids, breach.why) == (
        2,
        (SECOND.id,),
        f"{SECOND.id} is bad.",
    )
    rows = {row["id"]: row for row in editor.history}
    assert [row["id"] for row in editor.history] == [FIRST.id, SECOND.id, THIRD.id]
    assert rows[SECOND.id]["failed"] == breach.why
    assert not rows[SECOND.id]["took"]
    assert "failed" not in rows[FIRST.id]
    assert trainer.callback_metrics["guard/breaches"] == 1
    # What is left can be edited and taken out as ever.
    editor.remove([FIRST.id])
    editor.commit(editor.edit(SECOND))
    assert set(editor.delta.provenance.request_ids) == {SECOND.id, THIRD.id}


@pytest.mark.parametrize("name", ["ROME", "GRACE"])
def test_a_run_stops_where_it_is_told_to(name: str) -> None:
    editor, without = quick_editor(EDITORS[name]), quick_editor(EDITORS[name])
    trainer = fit(editor, Breaks())
    fit(without, None, requests=[FIRST])
    assert trainer.global_step == 2
    assert fingerprint(editor.model) == fingerprint(without.model)


class PowerCut(Callback):
    """Ends a run between its first edit and its second."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            raise RuntimeError("The power is gone.")


@pytest.mark.parametrize("name", ["ROME", "AlphaEdit", "GRACE"])
def test_edits_that_are_measured_together_go_together(name: str, tmp_path: Path) -> None:
    without = quick_editor(EDITORS[name])
    fit(without, None, requests=[THIRD])
    for case in ("whole", "resumed", "unrecorded"):
        guard = Breaks(on_breach="continue", every_n_edits=2, growth=1e9)
        folder = tmp_path / case
        beside: list[Callback] = [EditCheckpoint(str(folder))]
        if case != "unrecorded":
            beside.append(EditLedger(str(folder / "ledger.db")))
        editor, ckpt = quick_editor(EDITORS[name]), None
        if case == "resumed":
            with pytest.raises(RuntimeError, match="power is gone"):
                fit(quick_editor(EDITORS[name]), guard, PowerCut(), *beside)
            ckpt = folder / "last.ckpt"
        fit(editor, guard, *beside, ckpt_path=ckpt)
        [breach] = guard.breaches
        assert (breach.step, breach.request_ids) == (2, (FIRST.id, SECOND.id))
        assert guard.figures.keys() >= ({"growth"} if editor.target.originals else set())
        assert fingerprint(editor.model) == fingerprint(without.model)
        assert list(editor.delta.provenance.request_ids) == [THIRD.id]
        rows = [(row["id"], row.get("failed")) for row in editor.history]
        assert rows == [(FIRST.id, breach.why), (SECOND.id, breach.why), (THIRD.id, None)]
        if case == "unrecorded":
            continue
        entries = Ledger(folder / "ledger.db").entries()
        assert [(e.kind, e.request_ids) for e in entries] == [
            ("edit", (FIRST.id,)),
            ("rollback", (SECOND.id,)),
            ("undo", (FIRST.id,)),
            ("edit", (THIRD.id,)),
        ]
        assert (entries[2].undoes, entries[2].why) == ((1,), breach.why)


def test_what_is_not_measured_alone_is_not_proposed() -> None:
    guard = EditGuard(every_n_edits=2)
    with pytest.raises(EditError, match="takes each back at once"):
        fit(quick_editor(EDITORS["ROME"]), guard, EditLedger(propose=True))


def harsh() -> Any:
    """An editor that breaks the model with its first edit."""
    return quick_editor(EDITORS["FineTune"], lr=0.3, steps=8, stop_loss=0.0)


def test_each_budget_is_kept_or_broken() -> None:
    budgets: dict[str, tuple[Any, Any]] = {  # one that is kept, and one that is not
        "canaries": (None, [FIRST.prompt]),
        "locality": (0.0, 1.0),
        "perplexity_ratio": (1e9, 0.9),
        "relative_norm": (1e3, 1e-6),
        "growth": (1e3, 1e-6),
    }
    before = fingerprint(quick_editor(EDITORS["FineTune"]).model)
    for name, (kept, broken) in budgets.items():
        editor, guard = harsh(), EditGuard(**{name: kept})
        fit(editor, guard, requests=[FIRST])
        assert guard.breaches == [], name
        assert fingerprint(editor.model) != before, name
        assert kept is None or name in guard.figures, name
        editor, guard = harsh(), EditGuard(**{name: broken})
        fit(editor, guard, requests=[FIRST])
        [breach] = guard.breaches
        assert fingerprint(editor.model) == before, name
        assert (name if name != "canaries" else repr(FIRST.prompt)) in breach.why
        assert breach.figures == guard.figures, name
        assert name in breach.figures, name


def test_scores_in_tasks_are_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.45, 0.5, 0.45])

    def asked(*args: Any, **settings: Any) -> dict[str, float]:
        assert args[2] == ["own", "a/path"]
        assert settings == {"limit": 3, "include_path": "folder"}
        return {"own/acc": next(scores), "a/path/f1": 0.0, "own/f1": 0.0}

    monkeypatch.setattr(edit_guard, "capabilities", asked)
    places: dict[str, Any] = {"task_limit": 3, "task_folder": "folder"}
    guard = EditGuard(tasks={"own/acc": 0.9, "a/path/f1": 1.0}, **places)
    fit(harsh(), guard, requests=[FIRST])
    assert guard.breaches == []
    assert guard.figures == {"own/acc": 0.45, "a/path/f1": 0.0}
    guard = EditGuard(tasks={"own/acc": 0.95, "a/path/f1": 1.0}, **places)
    editor = harsh()
    before = fingerprint(editor.model)
    fit(editor, guard, requests=[FIRST])
    assert "`own/acc` is 0.45, below 0.95 of the 0.5 that it was" in guard.breaches[0].why
    assert fingerprint(editor.model) == before


def test_a_task_that_measures_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit_guard, "capabilities", lambda *_, **__: {"own/acc": 1.0})
    with pytest.raises(EditError, match=r"no 'own/f1' among .*: own/acc\. Name one of these"):
        fit(harsh(), EditGuard(tasks={"own/f1": 0.9}), requests=[FIRST])


@pytest.mark.filterwarnings("ignore")  # those of lm-eval and what it imports
def test_a_task_of_lm_eval_is_a_budget(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    write_own_task(tmp_path, [FIRST, SECOND, THIRD])
    guard = EditGuard(tasks={"own_facts/acc": 0.9}, task_folder=str(tmp_path))
    editor = harsh()
    before = fingerprint(editor.model)
    fit(editor, guard, requests=[FIRST])
    [breach] = guard.breaches
    assert breach.figures["own_facts/acc"] < 0.9
    assert "`own_facts/acc` is" in breach.why
    assert fingerprint(editor.model) == before


def test_a_memory_keeps_its_budgets() -> None:
    editor = quick_editor(EDITORS["GRACE"])
    canaries = [FIRST.prompt, SECOND.prompt]
    guard = EditGuard(canaries, perplexity_ratio=1.5, relative_norm=1e-9, on_breach="continue")
    fit(editor, guard, requests=[THIRD])
    assert guard.breaches == []
    assert guard.figures["canaries"] == 1.0
    assert "relative_norm" not in guard.figures  # there are no weights that it wrote
    guard = EditGuard([FIRST.prompt])
    editor = quick_editor(EDITORS["GRACE"], steps=30)
    before = fingerprint(editor.model)
    fit(editor, guard, requests=[FIRST])
    assert [breach.request_ids for breach in guard.breaches] == [(FIRST.id,)]
    assert fingerprint(editor.model) == before


def test_a_canary_may_say_what_it_must_be_answered_with() -> None:
    guard = EditGuard({FIRST.prompt: FIRST.target_old or ""})
    editor = harsh()
    fit(editor, guard, requests=[FIRST])
    [breach] = guard.breaches
    assert f"answered with {FIRST.target_old!r}" in breach.why
    with pytest.raises(EditError, match=r"does not answer the canary .* no edit could keep it"):
        fit(editor, EditGuard({FIRST.prompt: FIRST.target_new}), requests=[FIRST])


def test_a_model_that_says_nothing_finite_is_taken_back() -> None:
    editor = quick_editor(EDITORS["ROME"])
    compute = editor.compute_edit

    def wild(batch: Any) -> Any:
        edit = compute(batch)
        if [request.id for request in batch.requests] == [SECOND.id]:
            for _, tensor in edit.values():
                tensor.fill_(1e19)  # 1e38 in each place
        return edit

    editor.compute_edit = wild
    guard = EditGuard(on_breach="continue")
    fit(editor, guard)
    assert [breach.request_ids for breach in guard.breaches] == [(SECOND.id,)]
    assert "not finite" in editor.history[1]["failed"]
    without = quick_editor(EDITORS["ROME"])
    fit(without, None, requests=[FIRST, THIRD])
    assert fingerprint(editor.model) == fingerprint(without.model)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("name", ["ROME", "GRACE"])
def test_everything_beside_it_knows(name: str, is_first: bool, tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")

    def run(ckpt_path: Path | None = None) -> tuple[Any, Breaks]:
        editor, guard = quick_editor(EDITORS[name]), Breaks(on_breach="continue")
        others = [
            EditLedger(str(tmp_path / "ledger.db"), why="ticket 7"),
            EditEvaluator(readings=["teacher_forced"]),
            EditReport(str(tmp_path)),
            EditCheckpoint(str(tmp_path)),
        ]
        callbacks = [guard, *others] if is_first else [*others, guard]
        fit(editor, None, *callbacks, ckpt_path=ckpt_path)
        return editor, guard

    editor, guard = run()
    ledger = Ledger(tmp_path / "ledger.db")
    rows = [(e.kind, e.request_ids, e.why) for e in ledger.entries()]
    assert rows == [
        ("edit", (FIRST.id,), "ticket 7"),
        ("rollback", (SECOND.id,), f"{SECOND.id} is bad."),
        ("edit", (THIRD.id,), "ticket 7"),
    ]
    assert ledger.verify() == []
    assert [one.entry.id for one in ledger.standing(editor)] == [1, 3]
    lines = (tmp_path / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    edits = {row["id"]: row for row in map(json.loads, lines)}
    assert SECOND.id in json.loads((tmp_path / "results.json").read_text())["not_taken"]
    assert f"{SECOND.id} is bad." in json.dumps(edits[SECOND.id])
    # A run that goes on from the checkpoint has the same model, and tells of the same breach.
    resumed, again = run(tmp_path / "last.ckpt")
    assert fingerprint(resumed.model) == fingerprint(editor.model)
    assert again.breaches == guard.breaches
    assert len(ledger) == 3


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    editor, without = quick_editor(EDITORS["ROME"]), quick_editor(EDITORS["ROME"])
    fit(editor, Breaks(), EditCheckpoint(str(tmp_path)))
    resumed, guard = quick_editor(EDITORS["ROME"]), Breaks()
    last = tmp_path / "last.ckpt"
    trainer = fit(resumed, guard, EditCheckpoint(str(tmp_path)), ckpt_path=last)
    assert trainer.global_step == 3
    assert [breach.step for breach in guard.breaches] == [2]
    fit(without, None, requests=[FIRST, THIRD])
    assert fingerprint(resumed.model) == fingerprint(without.model)


@pytest.mark.parametrize("name", ["ROME", "GRACE"])
def test_a_dry_run_tells_and_keeps_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    editor = quick_editor(EDITORS[name])
    before = fingerprint(editor.model)
    guard = EditGuard([THIRD.prompt], dry_run=True)
    with caplog.at_level("INFO"):
        fit(editor, guard, requests=[FIRST, SECOND])
    assert fingerprint(editor.model) == before
    assert len(editor.delta) == 0
    told = [record.getMessage() for record in caplog.records]
    assert told[-1].startswith("Guard  no edit(s) taken back · canaries ")
    told = [line for line in told if line.startswith("Dry run")]
    assert [FIRST.id in told[0], SECOND.id in told[1]] == [True, True]
    assert all("bytes" in line and "p(target)" in line and "canaries" in line for line in told)
    assert {row["failed"] for row in editor.history} == {
        "It was taken back, since this was a dry run."
    }


def test_an_interruption_leaves_nothing_that_was_not_measured() -> None:
    class Interrupted(EditGuard):
        def _measure(self, editor: Any, rows: Any, norm_before: float) -> Any:
            raise RuntimeError("no")

    editor = quick_editor(EDITORS["ROME"])
    before = fingerprint(editor.model)
    with pytest.raises(RuntimeError, match="no"):
        fit(editor, Interrupted())
    assert fingerprint(editor.model) == before
    editor.commit(editor.edit(FIRST))  # nobody watches any longer


def test_a_later_epoch_tries_again_what_was_taken_back() -> None:
    editor, guard = quick_editor(EDITORS["ROME"]), Breaks(on_breach="continue")
    trainer = fit(editor, guard, max_epochs=2)
    assert [breach.step for breach in guard.breaches] == [2, 4]
    assert trainer.global_step == 4
    assert trainer.callback_metrics["guard/breaches"] == 2


def test_a_warning_that_is_an_error_finds_the_edit_taken_back() -> None:
    editor = quick_editor(EDITORS["ROME"])
    before = fingerprint(editor.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EditGuard took back")
        with pytest.raises(UserWarning, match="took back the edit of"):
            fit(editor, Breaks([FIRST.id]))
    assert fingerprint(editor.model) == before


def test_what_it_cannot_guard_is_refused_before_anything_is_trained() -> None:
    for module in (foreign(), quick_editor(FullTuning)):
        with pytest.raises(EditError, match=r"cannot take back what \w+ learns"):
            bare_trainer(max_epochs=1, callbacks=[EditGuard()]).fit(module, data_of())
    bare = [EditRequest(FIRST.prompt, FIRST.subject, FIRST.target_new)]
    with pytest.raises(EditError, match="none of the requests has locality probes"):
        fit(quick_editor(EDITORS["ROME"]), EditGuard(locality=0.5), requests=bare)


def test_budgets_are_checked() -> None:
    wrong: list[dict[str, Any]] = [
        {"locality": 1.5},
        {"perplexity_ratio": 0.0},
        {"relative_norm": -1.0},
        {"growth": 0.0},
        {"tasks": {"own/acc": 0.0}},
        {"tasks": {"own": 0.9}},
        {"max_new_tokens": 0},
        {"every_n_edits": 0},
        {"every_n_edits": 2, "dry_run": True},
    ]
    for settings in wrong:
        with pytest.raises(ValueError, match=next(iter(settings))):
            EditGuard(**settings)
    with pytest.raises((ValueError, SettingError), match="on_breach"):
        EditGuard(on_breach="explode")  # type: ignore[arg-type]


def test_the_preset_is_a_guard() -> None:
    import yaml

    text = (CONFIGS / "trainer" / "guard.yaml").read_text(encoding="utf-8")
    [callback] = yaml.safe_load(text)["trainer"]["callbacks+"]
    assert callback["class_path"] == "EditGuard"
    EditGuard(**callback["init_args"])
