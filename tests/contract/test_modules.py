# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What every editor keeps to, whatever its method."""

from __future__ import annotations

import copy
import inspect
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_edit import Edit, EditCheckpoint, EditMemory, EditModule, EditRequest, WeightDelta
from lightning_edit.core.errors import EditError, ModelError, RequestError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.metrics import edit_metrics
from lightning_edit.modules.fitting import CommitEdits
from lightning_edit.modules.locate_then_edit.base import LocateModule
from tests.contract.enumeration import (
    EDITORS,
    LEARNERS,
    METHOD_CONFIGS,
    RememberingEditor,
    arguments_of,
    class_in,
    documented_arguments,
    quick,
    quick_editor,
)
from tests.modules.helpers import (
    bare_trainer,
    fingerprint,
    same,
    same_edit,
    snapshot,
)

pytestmark = [
    # Keys of a tiny model are alike, and its weights few; editors say so.
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*survives rounding:UserWarning"),
]


# All tests of an editor come together, so that they share what is not changed by being looked at.
@pytest.fixture(params=[*EDITORS, RememberingEditor.__name__], scope="module")
def cls(request: pytest.FixtureRequest) -> type[EditModule]:
    return EDITORS.get(request.param, RememberingEditor)


@pytest.fixture(params=[*EDITORS, *LEARNERS])
def any_cls(request: pytest.FixtureRequest) -> type[EditModule]:
    """Editors that are trained, too."""
    found = EDITORS.get(request.param)
    return LEARNERS[request.param] if found is None else found


def data_of(n: int = 5, batch_size: int = 2) -> EditDataModule:
    return EditDataModule(requests=tiny_requests(n), batch_size=batch_size, eval_batch_size=2)


def fit(editor: Any, folder: Path, ckpt_path: Path | None = None, **trainer: Any) -> Any:
    """Five requests in three batches, with checkpoints; returns the Trainer."""
    made = bare_trainer(
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[EditCheckpoint(str(folder))],
        default_root_dir=folder,
        inference_mode=False,
        **trainer,
    )
    made.fit(editor, datamodule=data_of(), ckpt_path=ckpt_path)
    return made


class Fitted(NamedTuple):
    """An editor after a fit, the folder of its checkpoint, and the steps that it took."""

    editor: Any
    folder: Path
    steps: int


@pytest.fixture(scope="module")
def fitted(cls: type[EditModule], tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """What an uninterrupted fit leaves; a test that changes the model must undo that."""
    editor, folder = quick_editor(cls), tmp_path_factory.mktemp("fitted")
    return Fitted(editor, folder, fit(editor, folder).global_step)


@pytest.fixture(scope="module")
def edited(cls: type[EditModule]) -> tuple[Any, Any]:
    """An editor, and its edit of two requests, which is not applied."""
    editor = quick_editor(cls)
    return editor, editor.edit(tiny_requests(2))


# -- words -----------------------------------------------------------------------------------


def test_names_its_paper_and_documents_every_argument(any_cls: type[EditModule]) -> None:
    assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", any_cls.paper)
    assert "paper" in any_cls.__dict__ or any_cls.__mro__[1].__dict__.get("paper")
    doc = inspect.cleandoc(any_cls.__doc__ or "")
    assert "References:" in doc
    assert any_cls.paper.rpartition("/")[2] in doc
    described: dict[str, str] = {}
    for owner in reversed(any_cls.__mro__):
        if issubclass(owner, EditModule):
            described |= documented_arguments(owner)
    for name in arguments_of(any_cls):
        assert len(described.get(name, "")) > 10, f"{any_cls.__name__} does not document `{name}`"
    unknown = set(documented_arguments(any_cls)) - set(arguments_of(any_cls)) - {"kwargs"}
    assert not unknown, f"{any_cls.__name__} documents {unknown}, which it does not take"


def test_has_a_configuration_that_builds_it(any_cls: type[EditModule]) -> None:
    found = [path for path in METHOD_CONFIGS if class_in(path) == any_cls.__name__]
    assert found, f"configs/method has no configuration of {any_cls.__name__}"
    for path in found:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(EditModule, "model")
        parser.add_argument("--config", action="config")
        built = parser.instantiate(parser.parse_args(["--config", str(path)])).model
        assert type(built) is any_cls


def test_computes_edits_and_leaves_the_rest_of_it_to_the_base(any_cls: type[EditModule]) -> None:
    assert any_cls.compute_edit is not EditModule.compute_edit
    assert any_cls.edit is EditModule.edit


def test_is_made_on_the_cpu_whatever_device_is_the_default(
    any_cls: type[EditModule], tmp_path: Path
) -> None:
    model, tokenizer = trained_tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {**quick(any_cls), "model": str(tmp_path)}
    with torch.device("meta"):  # where Lightning has it as well, for accelerators
        editor = any_cls(**settings)
        editor.configure_model()
    wanted = any_cls.from_model(model, tokenizer, **quick(any_cls)).state_dict()
    found = editor.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# -- one edit --------------------------------------------------------------------------------


def test_computing_an_edit_leaves_the_model_as_it_was(cls: type[EditModule]) -> None:
    editor = quick_editor(cls)
    kept = snapshot(editor.model)
    flags = [p.requires_grad for p in editor.model.parameters()]
    modules = [name for name, _ in editor.model.named_modules()]
    edit = editor.edit(tiny_requests(3))
    assert same(editor.model, kept)
    assert flags == [p.requires_grad for p in editor.model.parameters()]
    assert all(p.grad is None for p in editor.model.parameters())
    assert modules == [name for name, _ in editor.model.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in editor.model.modules())
    assert not editor.model.training
    edit.check_targets(editor.model, editor.edit_optimizer.originals)
    assert edit.norm() > 0
    assert edit.nbytes > 0
    # Once more, the same bits.
    assert same_edit(edit, editor.edit(tiny_requests(3)))


def test_an_edit_knows_where_it_comes_from(cls: type[EditModule], edited: tuple[Any, Any]) -> None:
    edit, requests = edited[1], tiny_requests(2)
    provenance = edit.provenance
    assert provenance.method == cls.__name__
    assert provenance.paper == cls.paper
    assert provenance.request_ids == tuple(request.id for request in requests)
    assert provenance.base.sha256 == weight_hash(trained_tiny_model()[0])
    for name, value in quick(cls).items():
        assert provenance.settings[name] == value
    rows = edit.details["requests"]
    assert [row["id"] for row in rows] == list(provenance.request_ids)
    for row in rows:
        assert 0 <= row["p_target"] <= 1
        assert row["norm"] > 0
        assert row["steps"] <= quick(cls).get("steps", 3)
        assert math.isfinite(row["loss"])


def read_plainly(editor: Any, request: EditRequest) -> tuple[float, bool]:
    """Mean NLL of the new answer in the model as it stands, and whether it is what that says."""
    memory = EditMemory.find(editor.model)
    asked = [request.prompt] if memory is None else memory.rewrite([request.prompt], editor.tokens)
    prompt = editor.tokens.prompt(asked[0])
    target = editor.tokens.target(request.prompt, request.target_new)
    losses, hits = [], []
    with torch.no_grad():
        for i, token in enumerate(target):
            row = torch.tensor([[*prompt, *target[:i]]])
            log_probs = torch.log_softmax(editor.model(input_ids=row).logits[0, -1], -1)
            losses.append(-float(log_probs[token]))
            hits.append(int(log_probs.argmax()) == token)
    return sum(losses) / len(losses), all(hits)


def check_figures(editor: Any, requests: list[EditRequest], rows: list[Any]) -> None:
    """That figures of requests are what the model as it stands makes of them."""
    assert [row["id"] for row in rows] == [request.id for request in requests]
    for request, row in zip(requests, rows, strict=True):
        loss, took = read_plainly(editor, request)
        assert row["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-4), request.id
        assert row["p_target"] == pytest.approx(math.exp(-loss), rel=1e-3, abs=1e-7), request.id
        assert row["took"] is took, request.id


def test_figures_of_an_edit_are_those_of_the_model_with_it(edited: tuple[Any, Any]) -> None:
    editor, edit = edited
    with edit.applied(editor.model):
        check_figures(editor, tiny_requests(2), edit.details["requests"])


def test_figures_of_a_fit_are_those_of_the_model_that_it_leaves(fitted: Fitted) -> None:
    editor = fitted.editor
    # Where edits are committed, each is measured after its step; the last step's are left.
    first = 4 if isinstance(editor.fitting, CommitEdits) else 0
    check_figures(editor, tiny_requests(5)[first:], editor.history[first:])


def test_an_edit_makes_its_answer_likelier(edited: tuple[Any, Any]) -> None:
    editor, request = edited[0], tiny_requests(2)[1]
    edit = editor.edit(request)

    def nll() -> float:
        evaluator = editor.evaluator
        found = evaluator.evaluate([request], evaluator.baseline([request]))
        return float(found.probes[0].nll_new)

    before = nll()
    with edit.applied(editor.model):
        assert nll() < before


def test_applying_and_reverting_is_exact_also_out_of_a_file(
    edited: tuple[Any, Any], tmp_path: Path
) -> None:
    edit = edited[1]
    edit.save(tmp_path / "edit")
    model = trained_tiny_model()[0]
    before = fingerprint(model)
    edit.apply_(model)
    after = fingerprint(model)
    assert after != before
    edit.revert_(model)
    assert fingerprint(model) == before
    loaded = Edit.load(tmp_path / "edit")
    with loaded.applied(model):
        assert fingerprint(model) == after
    assert fingerprint(model) == before


def test_a_bare_request_is_enough(edited: tuple[Any, Any]) -> None:
    edit = edited[0].edit(EditRequest("People in {} speak", "Velmora", "Ostrish"))
    assert edit.norm() > 0


def test_a_subject_may_be_left_out_unless_the_method_needs_it(any_cls: type[EditModule]) -> None:
    """Editors that key on the subject refuse by name before the first edit, the others edit."""
    named, *others = tiny_requests(4)
    nameless = [replace(request, subject="") for request in others]
    editor = quick_editor(any_cls)
    before = fingerprint(editor.model)
    data = EditDataModule(requests=[named, *nameless], batch_size=1)
    trainer = bare_trainer(max_epochs=1)
    assert editor.needs_subject is issubclass(any_cls, LocateModule)
    if editor.needs_subject:
        message = rf"{any_cls.__name__} needs the subject of a request, .* {nameless[0].id!r}"
        for edits in (lambda: trainer.fit(editor, data), lambda: editor.edit(nameless)):
            with pytest.raises(RequestError, match=message):
                edits()
        assert fingerprint(editor.model) == before
    elif any_cls in LEARNERS.values():
        trainer.fit(editor, data)
        assert trainer.global_step
    else:
        assert len(editor.edit(nameless))


def test_works_without_gradients_around_it(edited: tuple[Any, Any]) -> None:
    editor, wanted = edited
    with torch.inference_mode():
        found = editor.edit(tiny_requests(2))
    assert same_edit(found, wanted)


def test_low_precision_weights_get_an_edit_in_float32(cls: type[EditModule]) -> None:
    editor = quick_editor(cls, dtype=torch.bfloat16)
    kept = snapshot(editor.model)
    edit = editor.edit(tiny_requests(2))
    assert same(editor.model, kept)
    tensors = (
        [edit.dense(name) for name in edit.changes]
        if isinstance(edit, WeightDelta)
        else [t for entry in edit.entries.values() for t in entry.tensors.values()]
    )
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    before = fingerprint(editor.model)
    with edit.applied(editor.model):
        assert {p.dtype for p in editor.model.parameters()} == {torch.bfloat16}
        assert fingerprint(editor.model) != before
    assert fingerprint(editor.model) == before


def test_an_edit_too_small_for_its_weights_is_told(cls: type[EditModule]) -> None:
    editor = quick_editor(cls, dtype=torch.bfloat16)
    edit = editor.edit(tiny_requests(1))
    if not edit.changes_weights:
        assert editor.edited_names(editor.tree) == []
        return
    small = edit * (1e-5 / max(float(edit.dense(n).abs().max()) for n in edit.changes))
    with pytest.warns(UserWarning, match="survives rounding to bfloat16"):
        small.apply_(editor.model)
    small.revert_(editor.model)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_other_architectures_are_edited_or_refused_by_name(
    cls: type[EditModule], kind: Any
) -> None:
    model = tiny_model(kind)
    kept, before = snapshot(model), fingerprint(model)
    flags = [p.requires_grad for p in model.parameters()]
    if kind == "t5" and cls.decoder_only:
        with pytest.raises(ModelError, match=f"{cls.__name__} needs a decoder-only model"):
            cls.from_model(model, tiny_tokenizer(), **quick(cls, kind))
        assert flags == [p.requires_grad for p in model.parameters()]
    else:
        editor = cls.from_model(model, tiny_tokenizer(), **quick(cls, kind))
        edit = editor.edit(tiny_requests(2))
        assert edit.norm() > 0
        with edit.applied(model):
            assert fingerprint(model) != before
    assert same(model, kept)
    assert fingerprint(model) == before


# -- fit -------------------------------------------------------------------------------------


def test_fit_commits_an_edit_a_step(fitted: Fitted, tmp_path: Path) -> None:
    editor = fitted.editor
    assert fitted.steps == 3  # five requests in batches of two
    ids = [request.id for request in tiny_requests(5)]
    assert [row["id"] for row in editor.history] == ids
    assert all(row["seconds"] > 0 for row in editor.history)
    base = weight_hash(trained_tiny_model()[0])
    assert editor.base.sha256 == base
    committed = editor.committed()
    assert committed.provenance.request_ids == tuple(ids)
    committed.save(tmp_path / "delta")
    edited = fingerprint(editor.model)
    assert edited != base
    # What is saved makes the same model out of the base, and the base out of it.
    loaded = Edit.load(tmp_path / "delta")
    model = trained_tiny_model()[0]
    loaded.apply_(model)
    assert fingerprint(model) == edited
    model = copy.deepcopy(editor.model)
    Edit.load(tmp_path / "delta").revert_(model)
    assert fingerprint(model) == base


def test_a_checkpoint_holds_what_changed_as_tensors_and_primitives(
    cls: type[EditModule], fitted: Fitted
) -> None:
    editor = fitted.editor
    saved = torch.load(fitted.folder / "last.ckpt", weights_only=True)
    announced = {f"model.{name}" for name in editor.edit_optimizer.originals}
    added = (".lora_", "model.edit_memory.")
    assert all(n in announced or any(a in n for a in added) for n in saved["state_dict"])
    assert set(saved["hyper_parameters"]) >= set(quick(cls))
    assert saved["lightning_edit"]["base_sha256"] == editor.base.sha256
    assert [row["id"] for row in saved["lightning_edit"]["edit_state"]["history"]]


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    cls: type[EditModule], fitted: Fitted, tmp_path: Path
) -> None:
    whole = fitted.editor
    for stop in (1, 2):
        folder = tmp_path / str(stop)
        fit(quick_editor(cls), folder, max_steps=stop)
        torch.manual_seed(stop)  # a process of its own would draw other numbers
        resumed = quick_editor(cls)
        trainer = fit(resumed, folder, ckpt_path=folder / "last.ckpt")
        assert trainer.global_step == 3
        assert fingerprint(resumed.model) == fingerprint(whole.model)
        assert [r["id"] for r in resumed.history] == [r["id"] for r in whole.history]
        one, other = resumed.committed(), whole.committed()
        assert same_edit(one, other)
        assert one.provenance == other.provenance


def test_a_second_fit_goes_on_from_the_first(cls: type[EditModule], tmp_path: Path) -> None:
    editor = quick_editor(cls)
    fit(editor, tmp_path)
    first = fingerprint(editor.model)
    trainer = bare_trainer(max_epochs=1)
    more = EditDataModule(requests=tiny_requests(7)[5:])
    trainer.fit(editor, datamodule=more)
    assert fingerprint(editor.model) != first
    assert len(editor.committed().provenance.request_ids) == 7
    editor.committed().revert_(editor.model)
    assert fingerprint(editor.model) == editor.base.sha256


def test_the_trainer_may_not_convert_the_weights(
    cls: type[EditModule], subtests: pytest.Subtests
) -> None:
    editor = quick_editor(cls)
    before = weight_hash(editor.model)
    for precision in ("bf16-true", "16-true", "64-true"):
        with subtests.test(precision):
            trainer = bare_trainer(max_epochs=1, precision=precision)
            with pytest.raises(EditError, match="Give the editor its `dtype` instead"):
                trainer.fit(editor, datamodule=data_of())
            assert weight_hash(editor.model) == before


def test_mixed_precision_does_not_round_edits(cls: type[EditModule], fitted: Fitted) -> None:
    plain, mixed = fitted.editor, quick_editor(cls)
    bare_trainer(max_epochs=1, precision="bf16-mixed").fit(mixed, datamodule=data_of())
    if plain.automatic_optimization:  # plain training, which the Trainer's precision is meant for
        assert fingerprint(mixed.model) != plain.base.sha256
    elif isinstance(plain, LocateModule):  # its target values are found by passes that are rounded
        for name in plain.delta.changes:
            found, wanted = mixed.delta.dense(name), plain.delta.dense(name)
            assert found.dtype == torch.float32
            assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()
    else:
        assert fingerprint(mixed.model) == fingerprint(plain.model)


# -- the other verbs -------------------------------------------------------------------------


def measured(verb: str, editor: Any, protocol: str, n: int = 2, ckpt_path: Any = None) -> Any:
    """What a verb finds, which leaves the model as it was but for a checkpoint that it takes up."""
    trainer = bare_trainer(
        inference_mode=False,
        limit_val_batches=1.0,
        enable_checkpointing=ckpt_path is not None,
        callbacks=[] if ckpt_path is None else [EditCheckpoint(str(ckpt_path.parent))],
    )
    kept = fingerprint(editor.model) if ckpt_path is None else ""
    editor.test_protocol = protocol
    how: dict[str, Any] = {} if verb == "predict" else {"verbose": False}
    found = getattr(trainer, verb)(editor, datamodule=data_of(n), ckpt_path=ckpt_path, **how)
    assert ckpt_path or fingerprint(editor.model) == kept, (verb, protocol)
    return found


def assert_told(validated: Any, predicted: Any, n: int) -> None:
    """Checks that what two of the verbs have found is of these requests."""
    assert set(validated[0]) >= {"val/reliability/autoregressive", "val/locality/teacher_forced"}
    found = [row for batch in predicted for row in batch]
    assert [row["id"] for row in found] == [request.id for request in tiny_requests(n)]
    assert found[0]["before"] == "Dorin."
    assert found[0]["prompt"] == "The capital of Velmora is"


def test_measuring_leaves_the_model_as_it_was(cls: type[EditModule]) -> None:
    editor = quick_editor(cls)
    validated = measured("validate", editor, "independent", 3)
    assert validated[0]["val/locality/teacher_forced"] == 1.0
    assert_told(validated, measured("predict", editor, "independent", 3), 3)


def test_the_other_verbs_take_up_a_checkpoint(cls: type[EditModule], fitted: Fitted) -> None:
    """They measure an edited editor, which stays as it is, and a fresh one that becomes it."""
    edited = fitted.editor
    wanted = {("test", "batch"): measured("test", edited, "batch")}
    for verb, protocol in (
        ("validate", "independent"),
        ("test", "independent"),
        ("test", "sequential"),
        ("predict", "independent"),
    ):
        wanted[verb, protocol] = measured(verb, edited, protocol)
        fresh = quick_editor(cls)
        found = measured(verb, fresh, protocol, ckpt_path=fitted.folder / "last.ckpt")
        assert found == wanted[verb, protocol], (verb, protocol)
        if edited.automatic_optimization:
            # A fit ends with weights that are original + change, to the last bit.
            torch.testing.assert_close(
                snapshot(fresh.model), snapshot(edited.model), rtol=1e-6, atol=1e-7
            )
        else:
            assert fingerprint(fresh.model) == fingerprint(edited.model)
        assert fresh.delta.provenance.request_ids == edited.delta.provenance.request_ids
    assert_told(wanted["validate", "independent"], wanted["predict", "independent"], 2)
    for protocol in ("independent", "batch", "sequential"):
        assert_tested(wanted["test", protocol])


def assert_tested(tested: Any) -> None:
    assert set(tested[0]) >= {"test/reliability/autoregressive", "test/portability/teacher_forced"}


def test_the_protocols_measure_what_they_are_named_after(cls: type[EditModule]) -> None:
    requests = tiny_requests(2)

    def tested(protocol: Any) -> dict[str, float]:
        trainer = bare_trainer(inference_mode=False)
        editor = quick_editor(cls, test_protocol=protocol)
        kept = fingerprint(editor.model)
        data = EditDataModule(requests=requests, eval_batch_size=2)
        [found] = trainer.test(editor, datamodule=data, verbose=False)
        assert fingerprint(editor.model) == kept, protocol
        assert_tested([found])
        return {name.removeprefix("test/"): value for name, value in found.items()}

    def by_hand(batches: list[list[EditRequest]], *, together: bool) -> dict[str, float]:
        """Edits batch by batch, each from the base or all upon each other, and measures."""
        editor = quick_editor(cls)
        metrics = edit_metrics()
        for batch in batches:
            if not together:
                editor.edit_optimizer.rewind()
            editor.edit_optimizer.stage(editor.edit(batch))
            editor.edit_optimizer.step()
            if not together:
                measure(editor, batch, metrics)
        if together:
            measure(editor, requests, metrics)
        return {name: float(value) for name, value in metrics.compute().items()}

    def measure(editor: Any, batch: list[EditRequest], metrics: Any) -> None:
        with editor.base_weights():
            baseline = editor.evaluator.baseline(batch)
        editor.evaluator.evaluate(batch, baseline).update(metrics)

    one_by_one = [[request] for request in requests]
    for protocol, wanted in (
        ("independent", by_hand(one_by_one, together=False)),
        ("sequential", by_hand(one_by_one, together=True)),
        ("batch", by_hand([requests], together=True)),
    ):
        found = tested(protocol)
        assert found
        assert found == {name: wanted[name] for name in found}, protocol
