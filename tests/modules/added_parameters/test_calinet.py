# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""CaliNET against its formulas written out with the model's own forward pass."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from lightning_edit import (
    CaliNET,
    Edit,
    EditDataModule,
    EditMemory,
    EditRequest,
    Evaluator,
    MemoryWrite,
)
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ArtifactError, EditError, RequestError
from lightning_edit.core.locator import ModelTree
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.functional.calinet import calibration_score
from lightning_edit.memories.slots import slot_output
from lightning_edit.models import load_model, load_tokenizer
from lightning_edit.modules.added_parameters.contrasts import wrong_relations
from lightning_edit.passes import target_loss
from tests import zoo
from tests.modules.helpers import bare_trainer, computed, fingerprint, plain_nll, same, snapshot
from tests.processes import run_process

SILENT = pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`:UserWarning")


def _model(kind: str = "trained") -> tuple[Any, Any]:
    return trained_tiny_model() if kind == "trained" else (zoo.build(kind), tiny_tokenizer())


def _editor(kind: str = "trained", **settings: Any) -> Any:
    model, tokenizer = _model(kind)
    return CaliNET.from_model(model, tokenizer, **{"slots": 8, "steps": 4, **settings})


def _plain_slots(
    model: Any, layers: Sequence[int], slots: Sequence[Sequence[Tensor]], act: Callable[..., Tensor]
) -> list[Any]:
    """Hooks that add act(h Kᵀ) V, or (act(h Gᵀ) ⊙ h Kᵀ) V, to whole MLPs."""

    seen: list[Tensor] = []

    def beside(parts: Sequence[Tensor]) -> Callable[..., Tensor]:
        *maps, values = parts

        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            states = seen.pop() if seen else args[0]
            fired = act(states @ maps[0].T)
            if len(maps) == 2:
                fired = fired * (states @ maps[1].T)
            return output + fired @ values

        return add

    tree = ModelTree.of(model)
    for layer in layers:
        first: Any = getattr(tree.blocks[layer], "fc1", None)  # whose MLPs are no modules
        if first is not None:
            first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return [
        tree.mlp(layer).register_forward_hook(beside(parts))
        for layer, parts in zip(layers, slots, strict=True)
    ]


def _plain_adafactor(parameters: list[nn.Parameter], gradients: Any, state: list[Any]) -> None:
    """One step with a constant learning rate of 0.01, from arXiv 1804.04235, section 7."""
    state.append(None)
    decay = 1 - len(state) ** -0.8
    for parameter, gradient in zip(parameters, gradients, strict=True):
        square = gradient**2 + 1e-30
        rows, columns = getattr(parameter, "moments", (0.0, 0.0))
        rows = decay * rows + (1 - decay) * square.mean(1)
        columns = decay * columns + (1 - decay) * square.mean(0)
        parameter.moments = rows, columns  # type: ignore[attr-defined]
        update = gradient / torch.sqrt(torch.outer(rows / rows.mean(), columns))
        update = update / max(1.0, float(update.square().mean().sqrt()))
        parameter.data -= 0.01 * update


@pytest.mark.parametrize(
    ("kind", "settings", "act"),
    [
        ("trained", {}, torch.relu),
        ("llama", {"layers": [0, -1], "gated": True, "activation": "silu"}, silu),
        ("t5", {"layers": [1]}, torch.relu),
        ("flan_t5", {"gated": True, "activation": "gelu"}, gelu),
        ("bart", {"layers": [-1, -2]}, torch.relu),
        ("gpt2", {}, torch.relu),
    ],
)
def test_slots_are_those_of_the_whole_model_trained_plainly(
    kind: str, settings: dict[str, Any], act: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lightning_edit.modules.added_parameters.calinet.MAX_ROWS", 2
    )  # more than one part
    editor = _editor(kind, **settings)
    requests = tiny_requests(3)
    edit = editor.edit(requests)
    [entry] = edit.entries.values()
    layers = editor.side.settings["layers"]
    # The same, by whole passes, one row at a time.
    model, _ = _model(kind)
    keys, values = editor.initial_slots(0)
    assert not values.any()
    parts = [[nn.Parameter(t.clone()) for t in (*k, v)] for k, v in zip(keys, values, strict=True)]
    leaves = [leaf for part in parts for leaf in part]
    handles, state = _plain_slots(model, layers, parts, act), list[Any]()
    for _ in range(4):
        nll = [
            token
            for request in requests
            for token in plain_nll(
                model,
                editor.tokens.prompt(request.prompt),
                editor.tokens.target(request.prompt, request.target_new),
            )
        ]
        gradients = torch.autograd.grad(torch.stack(nll).mean(), leaves)
        _plain_adafactor(leaves, gradients, state)
    assert len(handles) == len(layers)
    for i, (*maps, v) in enumerate(parts):
        found = entry.tensors
        torch.testing.assert_close(found["keys"][i], torch.stack([*maps]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found["values"][i], v.detach(), rtol=1e-3, atol=1e-4)
    # And the memory answers as these hooks do.
    with edit.applied(editor.model):
        for request in requests:
            prompt = editor.tokens.prompt(request.prompt)
            target = editor.tokens.target(request.prompt, request.target_new)
            one, other = (torch.stack(plain_nll(m, prompt, target)) for m in (editor.model, model))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_one_slot_by_hand() -> None:
    states = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    keys, values = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[2.0, -1.0]])
    assert slot_output(states, keys, values).tolist() == [[6.0, -3.0], [0.0, 0.0]]
    gated = torch.cat([keys, torch.tensor([[[0.0, 5.0]]])])
    assert slot_output(states, gated, values).tolist() == [[60.0, -30.0], [0.0, 0.0]]


@pytest.mark.parametrize("kind", ["trained", "t5"])
def test_fresh_slots_leave_every_bit(kind: str) -> None:
    editor = _editor(kind)
    base, _ = _model(kind)
    entry = editor._entry(editor._leaves(*editor.initial_slots(0)), {"a": {}}, 0)
    editor.memory.write({"a": entry})
    ids = torch.tensor([editor.tokens.prompt(tiny_requests(1)[0].prompt)])
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})
    with torch.no_grad():
        assert torch.equal(editor.model(**given).logits, base(**given).logits)
    # Where slots do not fire, values are of no matter.
    keys = torch.full_like(entry.tensors["keys"], 0.0)
    editor.memory.write({"a": replace(entry, tensors={"keys": keys, "values": keys[:, 0] + 9})})
    with torch.no_grad():
        assert torch.equal(editor.model(**given).logits, base(**given).logits)


def test_only_the_layers_above_are_run_again() -> None:
    editor = _editor(layers=[2], steps=5)
    calls = [0] * 4
    tree = ModelTree.of(editor.model)
    for i in range(4):

        def count(*_: Any, i: int = i) -> None:
            calls[i] += 1

        tree.mlp(i).register_forward_hook(count)
    computed(editor, tiny_requests(2))
    assert calls == [1, 1, 5, 5]  # once for all steps


def test_edits_lie_on_top_of_each_other_and_earlier_ones_stay() -> None:
    editor = _editor(steps=60)
    first, second = tiny_requests(4)[:2], tiny_requests(4)[2:]
    editor.edit(first).apply_(editor.model)
    kept = {name: e.tensors["values"].clone() for name, e in editor.memory.entries.items()}
    edit = editor.edit(second)
    assert list(edit.entries) == [second[0].id]
    assert edit.entries[second[0].id].notes == {"number": 1}
    edit.apply_(editor.model)
    for name, values in kept.items():
        assert torch.equal(editor.memory.entries[name].tensors["values"], values)
    # The figures are those of the model with both.
    for row in edit.details["requests"]:
        [request] = [r for r in second if r.id == row["id"]]
        prompt = editor.tokens.prompt(request.prompt)
        target = editor.tokens.target(request.prompt, request.target_new)
        with torch.no_grad():
            nll = torch.stack(plain_nll(editor.model, prompt, target))
        assert row["loss"] == pytest.approx(float(nll.mean()), rel=1e-3, abs=1e-5)
        assert row["p_target"] > 0.5


def test_training_ends_when_the_facts_are_learned() -> None:
    editor = _editor(slots=64, steps=500, stop_loss=0.1)
    rows = editor.edit(tiny_requests(3)).details["requests"]
    assert {row["steps"] for row in rows} < set(range(500))
    assert max(row["loss"] for row in rows) < 0.3


def test_another_optimizer_can_be_given() -> None:
    editor = _editor(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5), steps=1)
    request = tiny_requests(1)[0]
    [entry] = editor.edit(request).entries.values()
    keys, values = editor.initial_slots(0)
    parts = [nn.Parameter(keys[0, 0]), nn.Parameter(values[0])]
    model, _ = _model()
    _plain_slots(model, [3], [parts], torch.relu)
    prompt, target = request.prompt, request.target_new
    nll = plain_nll(model, editor.tokens.prompt(prompt), editor.tokens.target(prompt, target))
    gradients = torch.autograd.grad(torch.stack(nll).mean(), parts)
    assert torch.equal(entry.tensors["keys"][0, 0], keys[0, 0])  # the values are zero
    torch.testing.assert_close(entry.tensors["values"][0], -0.5 * gradients[1])


# -- by id -----------------------------------------------------------------------------------


def test_forgetting_one_of_a_block_trains_slots_for_the_others() -> None:
    editor, requests = _editor(steps=60), tiny_requests(5)
    name = requests[0].id
    editor.edit(requests[:3]).apply_(editor.model)
    three = fingerprint(editor.model)
    edit = editor.remove([requests[1].id])
    assert edit.provenance.request_ids == (requests[1].id,)
    assert list(editor.memory.requests) == [name, requests[2].id]
    # As if it had never been there.
    other = _editor(steps=60)
    other.edit([requests[0], requests[2]]).apply_(other.model)
    assert fingerprint(editor.model) == fingerprint(other.model)
    edit.revert_(editor.model)
    assert fingerprint(editor.model) == three
    # Beside a block on top, which stays.
    editor.edit(requests[3:]).apply_(editor.model)
    later = editor.memory.entries[requests[3].id]
    editor.remove([requests[1].id])
    assert editor.memory.entries[requests[3].id].equals(later)
    assert not editor.memory.entries[name].equals(other.memory.entries[name])
    answers = editor.evaluator.continuations([request.prompt for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        assert answer.startswith(request.target_new) == (request is not requests[1])
    editor.remove([r.id for r in requests if r is not requests[1]])
    assert fingerprint(editor.model) == fingerprint(_model()[0])
    with pytest.raises(EditError, match="no edit with the id 'capital-velmora'"):
        editor.remove([requests[0].id])


def test_without_the_editor_a_block_goes_as_a_whole() -> None:
    editor, requests = _editor(), tiny_requests(3)
    edit = editor.edit(requests)
    model, _ = _model()
    before = fingerprint(model)
    edit.apply_(model)
    after = fingerprint(model)
    with pytest.raises(
        EditError, match=r"together with those of 'language-velmora', 'river-dorin'"
    ):
        MemoryWrite.removing(model, [requests[0].id])
    assert fingerprint(model) == after
    MemoryWrite.removing(model, [request.id for request in requests]).apply_(model)
    assert fingerprint(model) == before


def test_a_request_takes_the_place_of_the_one_with_its_id() -> None:
    editor, requests = _editor(), tiny_requests(3)
    editor.edit(requests).apply_(editor.model)
    changed = replace(requests[0], target_new="Ostrish")
    editor.edit(changed).apply_(editor.model)
    held = editor.memory.requests
    assert held[changed.id]["target"] == "Ostrish"
    assert held[changed.id]["entries"] == [f"{changed.id}#1"]
    assert [held[r.id]["entries"] for r in requests[1:]] == [[changed.id]] * 2


def test_a_full_memory_is_told_before_anything_is_learned() -> None:
    editor = _editor(max_entries=1)
    editor.edit(tiny_requests(2)).apply_(editor.model)
    with pytest.raises(EditError, match="`max_entries=1` entries, and would hold 2"):
        editor.edit(tiny_requests(3)[2:])
    with pytest.raises(EditError, match="`max_entries=1` entries, and would hold 2"):
        bare_trainer(max_epochs=1).fit(editor, EditDataModule(requests=tiny_requests(3)[2:]))
    assert len(editor.memory.requests) == 2


# -- Lightning's loop ------------------------------------------------------------------------


def test_fit_with_all_facts_in_a_batch_is_an_edit_of_as_many_steps() -> None:
    fitted, edited, requests = _editor(), _editor(stop_loss=0.0), tiny_requests(4)
    trainer = bare_trainer(max_epochs=4)
    trainer.fit(fitted, EditDataModule(requests=requests, batch_size=4))
    assert trainer.global_step == 4
    edited.edit(requests).apply_(edited.model)
    [one], [other] = (list(e.memory.entries.values()) for e in (fitted, edited))
    assert dict(one.requests) == dict(other.requests)
    for name in ("keys", "values"):
        torch.testing.assert_close(one.tensors[name], other.tensors[name], rtol=1e-4, atol=1e-5)


def _say_again(folder: Path, prompts: list[str]) -> None:
    """Prints what a saved model says with a saved memory."""
    model = load_model(str(folder / "model"))
    MemoryWrite.load(folder / "memory").apply_(model)
    evaluator = Evaluator(model, PromptTokenizer(load_tokenizer(str(folder / "model"))))
    sys.stdout.write(json.dumps(evaluator.continuations(prompts)))


def test_a_further_fit_trains_another_block_and_its_memory_says_the_same_elsewhere(
    tmp_path: Path,
) -> None:
    editor, requests = _editor(), tiny_requests(4)
    weights = snapshot(editor.model)
    for part in (requests[:2], requests[2:]):
        data = EditDataModule(requests=part, batch_size=2)
        bare_trainer(max_epochs=30).fit(editor, data)
    assert same(editor.model, weights)
    assert all(p.requires_grad and p.grad is None for p in editor.model.parameters())
    assert [e.notes["number"] for e in editor.memory.entries.values()] == [0, 1]
    texts = editor.evaluator.continuations([request.prompt for request in requests])
    editor.committed().save(tmp_path / "memory")
    editor.model.save_pretrained(tmp_path / "model")
    editor.tokens.tokenizer.save_pretrained(tmp_path / "model")
    prompts = [request.prompt for request in requests]
    done = run_process(_say_again, tmp_path, prompts)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == texts


def test_accumulation_clipping_and_a_break_end_in_the_same_slots(tmp_path: Path) -> None:
    def data() -> EditDataModule:
        return EditDataModule(requests=tiny_requests(6), batch_size=2)

    settings: dict[str, Any] = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "enable_checkpointing": True,
        "max_epochs": 3,
    }

    def saving(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=1, save_top_k=0)

    whole = _editor()
    bare_trainer(**settings, callbacks=[saving("whole")]).fit(whole, data())
    bare_trainer(**settings, max_steps=2, callbacks=[saving("part")]).fit(_editor(), data())
    resumed = _editor()
    trainer = bare_trainer(**settings, callbacks=[saving("part")])
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "part/last.ckpt", weights_only=True)
    assert trainer.global_step == 6
    assert fingerprint(resumed.model) == fingerprint(whole.model)
    assert len(resumed.memory) == 1


def test_fit_takes_a_request_out_of_the_block_that_it_was_in() -> None:
    editor, requests = _editor(), tiny_requests(3)
    bare_trainer(max_epochs=2).fit(editor, EditDataModule(requests=requests, batch_size=3))
    changed = replace(requests[0], target_new="Ostrish")
    bare_trainer(max_epochs=2).fit(editor, EditDataModule(requests=[changed]))
    held = editor.memory.requests
    assert held[changed.id]["target"] == "Ostrish"
    assert len(held[changed.id]["entries"]) == 1
    assert held[requests[1].id]["entries"] == held[requests[2].id]["entries"] == [changed.id]


# -- what it is trained on -------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["rephrase", "both"])
def test_rephrases_are_trained_on_if_asked_for(train_on: Any) -> None:
    editor, request = _editor(train_on=train_on), tiny_requests(1)[0]
    batch = editor.encode([request])
    texts = [*([request.prompt] if train_on == "both" else []), *request.rephrases]
    prompts = [
        row[:length].tolist()
        for row, length in zip(batch.input_ids, batch.prompt_lengths, strict=True)
    ]
    assert prompts == [editor.tokens.prompt(text) for text in texts]
    editor.edit(request).apply_(editor.model)
    assert editor.memory.requests[request.id]["rephrases"] == list(request.rephrases)
    with pytest.raises(RequestError, match="'bare' has no rephrase"):
        editor.edit(EditRequest("People in {} speak", "Velmora", "Ostrish", id="bare"))
    assert len(editor.memory) == 1


@pytest.mark.parametrize("kind", ["trained", "t5"])
def test_cka_is_the_ratio_of_probabilities(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_loss, "MAX_ROWS", 2)
    templates = ["{} was born in", "The mother of {} is", "Song about {}:", "{} eats"]
    editor = _editor(kind, contrast_templates=templates)
    requests = tiny_requests(2)
    assert editor.assess([]) == {}
    found = editor.assess(requests)
    assert list(found) == [request.id for request in requests]
    for request in requests:

        def probability(prompt: str, answer: str = request.target_new) -> float:
            tokens = editor.tokens
            with torch.no_grad():
                nll = plain_nll(editor.model, tokens.prompt(prompt), tokens.target(prompt, answer))
            return math.exp(-float(sum(nll)))

        wrong = [probability(t.replace("{}", request.subject)) for t in templates[:3]]
        wanted = probability(request.prompt) / (sum(wrong) / 3)
        assert found[request.id] == pytest.approx(wanted, rel=1e-3)


def test_cka_by_hand() -> None:
    others = torch.tensor([[0.1, 0.3], [0.4, 0.4]]).log()
    scores = calibration_score(torch.tensor([0.4, 0.1]).log(), others)
    torch.testing.assert_close(scores, torch.tensor([2.0, 0.25]))
    tiny = torch.tensor([-500.0, -500.0])  # of which float32 knows no exponential
    assert float(calibration_score(tiny[0], tiny)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least one prompt"):
        calibration_score(torch.zeros(()), torch.zeros(0))


def test_wrong_relations_are_those_of_other_requests() -> None:
    one = EditRequest("The capital of {} is", "France", "Rome", rephrases=("{}'s capital is",))
    same_relation = EditRequest("{}'s capital is", "Spain", "Oslo", rephrases=("{} is ruled from",))
    also = EditRequest("{} is ruled from", "Peru", "Bern")
    other = EditRequest("{} was written by", "Emma", "Poe")
    prompts = wrong_relations([one, same_relation, also, other])
    assert prompts == [
        ["France was written by"],
        ["Spain was written by"],
        ["Peru was written by"],
        ["The capital of Emma is", "Emma's capital is", "Emma is ruled from"],
    ]
    with pytest.raises(RequestError, match="no prompt of another relation to compare"):
        wrong_relations([one, same_relation, also])
    found = wrong_relations([one], ["{}'s capital is", "{} is made of", "{} eats"], count=1)
    assert found == [["France is made of"]]


def test_only_false_facts_are_trained() -> None:
    requests = tiny_requests(6)
    editor = _editor(false_only=True, threshold=50.0)
    scores = editor.assess(requests)
    false = [name for name, score in scores.items() if score < 50]
    assert 0 < len(false) < 6
    edit = editor.edit(requests)
    rows = edit.details["requests"]
    assert {row["id"]: row["cka"] for row in rows} == pytest.approx(scores)
    assert [row["id"] for row in rows if row["steps"]] == false
    edit.apply_(editor.model)
    assert list(editor.memory.requests) == false
    # And so in a fit.
    fitted = _editor(false_only=True, threshold=50.0)
    bare_trainer(max_epochs=2).fit(fitted, EditDataModule(requests=requests, batch_size=6))
    assert list(fitted.memory.requests) == false
    assert {row["id"]: row["cka"] for row in fitted.history} == pytest.approx(scores)


@SILENT
def test_nothing_is_trained_where_nothing_is_false() -> None:
    editor = _editor(false_only=True, threshold=0.0)
    requests = tiny_requests(3)
    edit = editor.edit(requests)
    assert len(edit) == 0
    assert {row["norm"] for row in edit.details["requests"]} == {0.0}
    bare_trainer(max_epochs=2).fit(editor, EditDataModule(requests=requests, batch_size=3))
    assert len(editor.memory) == 0
    assert [row["steps"] for row in editor.history] == [0, 0, 0]


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "error", "words"),
    [
        ("trained", {"slots": 0}, ValueError, "`slots` is expected to be at least 1"),
        ("trained", {"steps": 0}, ValueError, "`steps` is expected to be at least 1"),
        ("trained", {"train_on": "all"}, ValueError, "`train_on` is expected to be one of"),
        ("trained", {"contrast_templates": ["x"]}, ValueError, "where the subject goes"),
        ("trained", {"activation": "sigh"}, EditError, "no activation 'sigh'"),
        ("gpt2", {"gated": True}, EditError, "has no gate"),
        ("trained", {"layers": [7]}, EditError, "Layer 7 does not exist"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    kind: str, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model, tokenizer = _model(kind)
    with pytest.raises(error, match=words):
        CaliNET.from_model(model, tokenizer, **settings)
    assert EditMemory.find(model) is None


def test_a_memory_of_other_slots_is_refused(tmp_path: Path) -> None:
    editor = _editor()
    editor.edit(tiny_requests(1)).save(tmp_path / "edit")
    other = _editor(slots=4)
    other.edit(tiny_requests(2)[1]).apply_(other.model)
    with pytest.raises(ArtifactError, match="belong to a CalibrationSlots with"):
        Edit.load(tmp_path / "edit").apply_(other.model)
    model = tiny_model("t5")
    with pytest.raises(ArtifactError):
        Edit.load(tmp_path / "edit").apply_(model)
    assert EditMemory.find(model) is None
