# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""ROME's closed form, on models of many families and against the reference figures."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_edit import ROME, EditRequest
from lightning_edit.core.errors import ArtifactError, EditError
from lightning_edit.core.locator import ModelTree
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.functional.least_squares import factorize
from lightning_edit.functional.rank_one import rank_one_update, whiten
from tests import zoo
from tests.modules.helpers import same, snapshot

FAMILIES = ("llama", "gpt2", "gptj", "gptneox", "opt", "gemma2", "qwen3", "falcon")
SETTINGS: dict[str, Any] = {
    "layers": [1],
    "steps": 4,
    "context_templates": ["{}", "It is said. {}", "A longer beginning: {}"],
}
# Keys of random models are alike, which the editor says.
pytestmark = pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning")


def moment_of(width: int) -> Tensor:
    """A second moment that is neither diagonal nor like the keys."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(4 * width, width, generator=generator)
    return keys.T @ keys / len(keys) + 0.1 * torch.eye(width)


def editor_of(model: Any, **settings: Any) -> ROME:
    editor = ROME.from_model(model, tiny_tokenizer(), **{**SETTINGS, **settings})
    site = ModelTree.of(model).mlp_out(1)
    editor.set_second_moment(1, moment_of(site.in_features))
    return editor


def at_subject(editor: ROME, request: EditRequest, template: str = "{}") -> tuple[Tensor, Tensor]:
    """Input and output of the edited projection at the subject's last token, by the whole model."""
    model: Any = editor.model
    prompt, last = editor.tokens.subject_last(request.prompt, request.subject, template[:-2])
    seen: list[Tensor] = []

    def record(_: nn.Module, args: Any, output: Tensor) -> None:
        # Copies: Falcon adds to the output in place.
        seen.extend(t.reshape(len(prompt), -1)[last].clone() for t in (args[0], output))

    module = editor.tree.mlp_out(1).module(model)
    hook = module.register_forward_hook(record)
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt]))
    hook.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_edited_matrix_returns_the_target_value(kind: str) -> None:
    model = zoo.build(kind)
    editor = editor_of(model)
    request = tiny_requests(2)[1]
    kept = snapshot(model)
    edit = editor.edit(request)
    assert same(model, kept)
    key, value = at_subject(editor, request)
    found = edit.details["target_values"]
    with edit.applied(model):
        key_after, value_after = at_subject(editor, request)
    assert same(model, kept)
    assert torch.equal(key, key_after)  # nothing below the matrix changed
    torch.testing.assert_close(value_after, found.values[0], rtol=1e-4, atol=1e-4)
    assert (value_after - value).norm() > 0.1
    # ΔW = δ uᵀ / (u · k), with u along C⁻¹ of the mean key: by numpy, from the model's own keys.
    keys = [at_subject(editor, request, template)[0] for template in SETTINGS["context_templates"]]
    mean = torch.stack(keys).mean(0).double().numpy()
    moment = moment_of(len(mean)).double().numpy()
    direction = np.linalg.solve(moment, mean)
    wanted = np.outer(found.deltas[0].double().numpy(), direction) / (
        direction @ key.double().numpy()
    )
    name = editor.tree.mlp_out(1).name
    change = edit.dense(name)
    if editor.tree.mlp_out(1).transposed:
        change = change.T
    scale = float(np.abs(wanted).max())
    np.testing.assert_allclose(change.numpy(), wanted, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_later_request_of_a_batch_sees_the_earlier_ones(kind: str) -> None:
    model = zoo.build(kind)
    editor = editor_of(model)
    requests = [tiny_requests(3)[0], tiny_requests(3)[2]]
    edit = editor.edit(requests)
    found = edit.details["target_values"]
    with edit.applied(model):
        last = at_subject(editor, requests[1])[1]
        first = at_subject(editor, requests[0])[1]
    torch.testing.assert_close(last, found.values[1], rtol=1e-4, atol=1e-4)
    # The one before has been disturbed since: that is what a sequence does.
    assert (first - found.values[0]).norm() > 1e-3
    assert [row["id"] for row in edit.details["requests"]] == [r.id for r in requests]
    name = editor.tree.mlp_out(1).name
    assert edit.changes[name].rank == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_edits_as_its_requests_one_after_another_with_values_found_at_once(
    kind: str,
) -> None:
    model = zoo.build(kind)
    editor = editor_of(model)
    requests = tiny_requests(3)
    whole = editor.edit(requests).details["target_values"]
    for e, request in enumerate(requests):
        alone = editor.edit(request).details["target_values"]
        assert len(alone.losses[0]) == len(whole.losses[e])
        scale = float(alone.deltas.norm())
        torch.testing.assert_close(whole.deltas[e], alone.deltas[0], rtol=1e-4, atol=1e-4 * scale)


def test_an_edit_teaches_the_answer() -> None:
    model, tokenizer = trained_tiny_model()
    editor = ROME.from_model(model, tokenizer, layers=[0], context_templates=["{}"])
    request = tiny_requests(1)[0]
    editor.set_second_moment(0, moment_of(128))
    assert editor.evaluator.continuations([request.prompt]) == ["Dorin."]
    edit = editor.edit(request)
    assert edit.details["requests"][0]["p_target"] > 0.5
    with edit.applied(model):
        assert editor.evaluator.continuations([request.prompt]) == ["Kettleby."]


@pytest.mark.filterwarnings("default:.*the update direction and the key:UserWarning")
def test_an_update_that_hits_other_keys_is_told() -> None:
    model = zoo.build("llama")
    editor = editor_of(model)
    request = tiny_requests(1)[0]
    key = at_subject(editor, request)[0]
    # Keys like this one are so frequent that C⁻¹ k turns away from k.
    unit = key / key.norm()
    lopsided = 10 * torch.outer(unit, unit) + 1e-3 * torch.eye(len(key))
    editor.set_second_moment(1, lopsided)
    editor.contexts.load_edit_state({"context_templates": [["{}", "Yes. {}"]]})
    with pytest.warns(UserWarning, match=f"Request '{request.id}'.*cosine of only"):
        editor.edit(request)


def test_a_singular_second_moment_is_refused() -> None:
    editor = editor_of(zoo.build("llama"))
    editor.set_second_moment(1, torch.ones(64, 64))
    with pytest.raises(ArtifactError, match=r"layer 1: .*positive definite.*too few tokens"):
        editor.edit(tiny_requests(1))


def test_an_update_that_is_not_finite_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    editor = editor_of(model)
    kept = snapshot(model)
    monkeypatch.setattr(
        "lightning_edit.modules.locate_then_edit.rome.rank_one_update",
        lambda r, u, k: (torch.full((len(r), 1), torch.inf), u[:, None], u @ k),
    )
    with pytest.raises(EditError, match="not finite"):
        editor.edit(tiny_requests(1))
    assert same(model, kept)


def test_rank_one_update_refuses_what_has_no_solution() -> None:
    with pytest.raises(ValueError, match="orthogonal"):
        rank_one_update(torch.ones(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))


# -- the reference figures -------------------------------------------------------------------

GOLDEN_TEMPLATES = ["{}", "Today. {}", "In short: {}", "The report said that {}"]


def covariances(model: Any) -> dict[str, Tensor]:
    """The two second moments of layer 7 that the figures were made with."""
    total = torch.zeros(1536, 1536, dtype=torch.float64)

    def add(_: nn.Module, args: Any) -> None:
        keys = args[0].detach().reshape(-1, 1536).double()
        total.add_(keys.T @ keys)
        raise Done

    class Done(Exception):  # noqa: N818
        """The blocks above are not needed."""

    hook = model.model.layers[7].mlp.down_proj.register_forward_pre_hook(add)
    ids = np.random.RandomState(0).randint(3, 49152, size=(16, 4, 128))
    for rows in ids:
        with torch.no_grad(), contextlib.suppress(Done):
            model.model(input_ids=torch.from_numpy(rows), use_cache=False)
    hook.remove()
    a = torch.from_numpy(np.random.RandomState(107).randn(1536, 3072))
    return {
        "random_tokens": (total / ids.size).float(),
        "synthetic": (0.02 * (a @ a.T) / 3072).float(),
    }


def assert_vector(found: Tensor, wanted: dict[str, Any], what: str) -> None:
    """Norm to 1e-4, first entries to 1e-2 of their root mean square."""
    norm = float(found.double().norm())
    assert norm == pytest.approx(wanted["norm"], rel=1e-4), what
    rms = norm / found.numel() ** 0.5
    torch.testing.assert_close(
        found.flatten()[:8].double(),
        torch.tensor(wanted["first8"]).double(),
        rtol=0,
        atol=1e-2 * rms,
        msg=what,
    )


@pytest.mark.real
def test_figures_of_the_reference_implementation(
    default_model: tuple[Any, Any], goldens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = default_model
    outputs = json.loads((goldens / "rome" / "outputs.json").read_text())
    records = json.loads((goldens / "rome" / "inputs.json").read_text())["requests"]
    by_subject = {record["subject"]: record for record in records}
    editor = ROME.from_model(model, tokenizer, layers=[7], context_templates=GOLDEN_TEMPLATES)
    weight = model.model.layers[7].mlp.down_proj.weight
    traces = {"random_tokens": 30.9012339, "synthetic": 30.7240704}
    moments = covariances(model)
    for subject in outputs["synthetic"]:
        record = by_subject[subject]
        request = EditRequest(record["prompt"], subject, record["target_new"].strip())
        with monkeypatch.context() as patch:
            for source, moment in moments.items():
                assert float(moment.double().trace()) == pytest.approx(traces[source], rel=1e-5)
                editor.set_second_moment(7, moment)
                edit = editor.edit(request)
                wanted = outputs[source][subject]
                check_figures(edit, wanted, moment, weight, f"{source}, {subject}")
                check_probabilities(editor, edit, record, wanted)
                # Target values do not depend on the second moment, and take the time.
                found = edit.details["target_values"]
                patch.setattr(editor, "target_values", lambda *_, found=found: found)


def check_figures(
    edit: Any, wanted: dict[str, Any], moment: Tensor, weight: Tensor, where: str
) -> None:
    found = edit.details["target_values"]
    for t, vector in enumerate(wanted["k_per_template"]):
        assert_vector(found.keys[0, t], vector, f"{where}: k of template {t}")
    assert_vector(found.keys[0].mean(0), wanted["k_mean"], f"{where}: mean k")
    assert_vector(found.keys[0, 0], wanted["k_prompt_only"], f"{where}: k of the prompt")
    direction = whiten(found.keys[0].mean(0), factorize(moment))
    assert_vector(direction, wanted["u"], f"{where}: u")
    divisor = float(direction @ found.keys[0, 0])
    assert divisor == pytest.approx(wanted["u_dot_k_divisor"], rel=1e-4), where
    assert_vector(found.outputs[0, 0], wanted["Wk_current_output"], f"{where}: W k")
    assert_vector(found.values[0], wanted["v_star"], f"{where}: v*")
    assert_vector(found.deltas[0], wanted["v_star_minus_current"], f"{where}: v* - W k")
    passes = found.losses[0]
    assert len(passes) == len(wanted["losses"]), where
    largest = max(entry["total"] for entry in wanted["losses"])
    for ours, theirs in zip(passes, wanted["losses"], strict=True):
        for name, value in theirs.items():
            slack = 1e-3 * (largest if name in ("total", "nll") else value) + 1e-5
            assert ours[name] == pytest.approx(value, abs=slack), (where, name)
    [(name, change)] = [(name, edit.dense(name)) for name in edit.changes]
    assert name == "model.layers.7.mlp.down_proj.weight"
    figures = wanted["dW"]["model.layers.7.mlp.down_proj"]
    assert float(change.norm()) == pytest.approx(figures["fro"], rel=1e-4), where
    rms = figures["fro"] / change.numel() ** 0.5
    for part, values in ((change[0, :8], "row0_first8"), (change[:8, 0], "col0_first8")):
        torch.testing.assert_close(
            part.double(), torch.tensor(figures[values]).double(), rtol=0, atol=1e-2 * rms
        )
    for s, value in enumerate(figures["proj_seed1000"]):
        random = np.random.RandomState(1000 + s)
        a, b = random.randn(576), random.randn(1536)
        found_value = a @ change.double().numpy() @ b
        assert found_value == pytest.approx(value, abs=1e-3 * figures["fro"]), where
    assert float(weight.detach().norm()) == pytest.approx(wanted["W_fro"], rel=1e-4)


def check_probabilities(
    editor: ROME, edit: Any, record: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """P(new) and P(true) of the edit's own prompt, a paraphrase and two neighbors."""
    tokens = editor.tokens.tokenizer

    def check(stage: str) -> None:
        asked = [
            (tokens(entry["prompt"]).input_ids, tokens(record[target]).input_ids, entry[key])
            for entry in wanted[stage].values()
            for key, target in (("p_new", "target_new"), ("p_true", "target_true"))
        ]
        # What stands to the right of a row changes nothing in it.
        width = max(len(ids) + len(answer) for ids, answer, _ in asked)
        rows = [(ids + answer + [0] * width)[:width] for ids, answer, _ in asked]
        with torch.no_grad():
            logp = torch.log_softmax(editor.model(input_ids=torch.tensor(rows)).logits, -1)
        for row, (ids, answer, probability) in enumerate(asked):
            picked = [float(logp[row, len(ids) - 1 + j, t]) for j, t in enumerate(answer)]
            assert float(np.exp(sum(picked))) == pytest.approx(probability, abs=1e-3), (stage, row)

    check("pre_edit")
    with edit.applied(editor.model):
        check("post_edit")


def test_searches_end_where_they_are_told_and_in_turns_of_any_size() -> None:
    made = []
    for settings in ({}, {"max_rows": 2}, {"stop_loss": 1e9}):
        editor = ROME.from_model(
            *trained_tiny_model(),
            layers=[0],
            steps=4,
            tokens_per_dimension=1,
            context_templates=["{}"],
            **settings,
        )
        made.append(editor.edit(tiny_requests(2)))
    whole, in_turns, at_once = made
    name = next(iter(whole.changes))
    torch.testing.assert_close(whole.dense(name), in_turns.dense(name), rtol=1e-4, atol=1e-6)
    assert [row["steps"] for row in at_once.details["requests"]] == [1, 1]
    with pytest.raises(ValueError, match="`max_rows` is expected to be at least 1, but got 0"):
        ROME.from_model(*trained_tiny_model(), max_rows=0)
