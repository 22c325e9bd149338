# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A caller's model comes back as it came, and what it came as changes no edit and no figure."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_edit import EditModule, EditRequest
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.processes import Processes
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.evaluator import Evaluator
from lightning_edit.evaluation.prose import perplexity
from lightning_edit.tracing.causal_tracing import trace_facts
from tests.contract.enumeration import EDITORS, LEARNERS, RememberingEditor, quick
from tests.modules.helpers import bare_trainer, circumstances, same, same_edit, snapshot

pytestmark = [
    # Keys of a tiny model are alike, and its weights few; editors say so.
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*survives rounding:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*in eval mode:UserWarning"),
]

ALL = {**EDITORS, RememberingEditor.__name__: RememberingEditor, **LEARNERS}

Unchanged = Callable[[], None]


@pytest.fixture(params=ALL)
def cls(request: pytest.FixtureRequest) -> Any:
    return ALL[request.param]


def made_odd(model: Any) -> Any:
    """The model as a caller may have it: half in training, half frozen, with dropout on."""
    model.train()
    model.model.layers[2].eval()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    model.model.layers[0].register_forward_hook(_nothing)
    model.generation_config.update(no_repeat_ngram_size=1, suppress_tokens=list(range(100, 300)))
    return model


def _nothing(*_: Any) -> None:
    """A hook of the caller's own."""


@pytest.fixture
def model() -> Any:
    return made_odd(trained_tiny_model()[0])


def watched(model: Any) -> Unchanged:
    """A check that all of the model is as it is now."""
    weights, before = snapshot(model), circumstances(model)

    def check() -> None:
        now = circumstances(model)
        for name, wanted in before.items():
            assert now[name] == wanted, name
        assert same(model, weights)

    return check


@pytest.fixture
def unchanged(model: Any) -> Iterator[Unchanged]:
    """Checks that all of the model is as it came, which it is to be at the end in any case."""
    check = watched(model)
    yield check
    check()


def editor_of(cls: Any, model: Any) -> Any:
    return cls.from_model(model, trained_tiny_model()[1], **quick(cls))


def data_of() -> EditDataModule:
    return EditDataModule(requests=tiny_requests(4), batch_size=2, eval_batch_size=1)


def as_given(editor: Any, wanted: dict[str, Any]) -> None:
    """Checks all but the weights, which a fit has changed."""
    now = circumstances(editor.model)
    for name, value in wanted.items():
        assert now[name] == value, name


def test_edits_and_figures_are_those_of_eval_mode(cls: Any) -> None:
    # Of one model, since the last bits depend on where tensors lie.
    model, requests = trained_tiny_model()[0], tiny_requests(2)

    def found(check: Unchanged) -> list[Any]:
        editor = editor_of(cls, model)
        check()
        results = [editor.evaluator.evaluate(requests).probes]
        check()
        if cls in LEARNERS.values():
            results.append(editor.edit_loss(requests, Processes())[1])
            check()
            return results
        edit = editor.edit(requests)
        check()
        with edit.applied(model):
            results.append(editor.evaluator.evaluate(requests).probes)
        check()
        edits.append(edit)
        return results

    edits: list[Any] = []
    wanted = found(watched(model))
    check = watched(made_odd(model))
    assert found(check) == wanted
    assert not edits or same_edit(*edits)
    edits.clear()
    gc.collect()
    check()


def test_whatever_fails_leaves_the_model_as_it_came(
    cls: Any, model: Any, unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of(cls, model)
    calls = 0
    usual = type(model.model.layers[3]).forward

    def failing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise OSError("in the middle")
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[3]), "forward", failing)
    for last in (1, 6, 14, 30):  # noqa: B007 (the patched method reads it)
        for work in (
            lambda: editor.edit(tiny_requests(2)),
            lambda: editor.evaluator.evaluate(tiny_requests(2)),
            lambda: bare_trainer(limit_val_batches=1.0).validate(editor, data_of(), verbose=False),
        ):
            calls = 0
            try:
                work()
            except Exception as error:  # an editor may have a word of its own for it
                assert calls or "never trained" in str(error)  # noqa: PT017
            unchanged()


def test_a_fit_has_the_model_on_loan(cls: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, wanted = editor_of(cls, model), circumstances(model)
    seen: list[bool] = []
    usual = type(editor.fitting).training_step

    def step(self: Any, *args: Any) -> Any:
        seen.append(any(module.training for module in model.modules()))
        if len(seen) == fails:
            raise OSError("in the middle")
        return usual(self, *args)

    monkeypatch.setattr(type(editor.fitting), "training_step", step)
    for fails in (0, 2):
        seen.clear()
        trainer = bare_trainer(max_epochs=1)
        if fails:
            with pytest.raises(OSError, match="in the middle"):
                trainer.fit(editor, data_of())
        else:
            trainer.fit(editor, data_of())
        assert not any(seen)
        if hasattr(model, "edit_memory"):  # whose entries are looked up by hooks
            wanted.pop("hooks", None)
        as_given(editor, wanted)
    for verb in ("validate", "test", "predict"):
        getattr(bare_trainer(limit_val_batches=1.0), verb)(editor, data_of())
        as_given(editor, wanted)


def test_measuring_is_in_eval_mode_without_an_editor() -> None:
    model, tokenizer = trained_tiny_model()
    tokens, requests = PromptTokenizer(tokenizer), tiny_requests(2)
    text = "The capital of Velmora is Dorin. " * 20

    def measured() -> list[Any]:
        return [
            Evaluator(model, tokens).continuations([r.prompt for r in requests]),
            Evaluator(model, tokens).evaluate(requests).probes,
            perplexity(model, tokens, text),
            trace_facts(model, tokens, requests).to_dict(),
        ]

    wanted = measured()
    check = watched(made_odd(model))
    assert measured() == wanted
    check()


def test_what_runs_a_model_outside_an_edit_gives_it_back(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    asked: dict[str, Callable[[Any], Any]] = {
        "second_moment": lambda e: e.second_moment(1).sum().item(),
        "templates": lambda e: e.templates,
        "find": lambda e: e.find(tiny_requests(1)[0]).indices.tolist(),
        "assess": lambda e: e.assess(tiny_requests(8)),
        "remembered_states": lambda e: e.remembered_states().sum().item(),
    }
    seen: list[Any] = []
    for name, cls in EDITORS.items():
        for attribute in asked:
            method = inspect.getattr_static(cls, attribute, None)
            if method is None or method in seen:
                continue
            seen.append(method)
            with subtests.test(f"{name}.{attribute}"):
                settings = {k: v for k, v in quick(cls).items() if k != "context_templates"}
                model: Any = trained_tiny_model()[0]
                found: list[Any] = []
                for is_odd in (False, True):
                    if is_odd:
                        made_odd(model)
                    check = watched(model)
                    settings["cache_dir"] = str(tmp_path / f"{name}-{len(found)}")
                    editor: EditModule = cls.from_model(
                        model, trained_tiny_model()[1], **settings, layers=[1]
                    )
                    found.append(asked[attribute](editor))
                    check()
                assert found[0] == found[1]


def test_a_training_of_ones_own_goes_on_after_an_editor(model: Any) -> None:
    """Half the parameters get gradients, as before."""
    wanted = [p.requires_grad for p in model.parameters()]
    for cls in EDITORS.values():
        if "checkpoint" in quick(cls):
            continue
        editor = editor_of(cls, model)
        with editor.edit(EditRequest("People in {} speak", "Velmora", "Ostrish")).applied(model):
            pass
        memory = getattr(model, "edit_memory", None)
        if memory is not None:
            memory.detach_()
        del editor
    loss = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    got = [p.grad is not None for p in model.parameters()]
    assert got == wanted
