# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What locate-then-edit methods take from the user, sample, read and keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_edit import EMMET, MEMIT, PMET, ROME, AlphaEdit, EditRequest
from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import (
    ArtifactError,
    FailedRequestsError,
    LocatorError,
    ModelError,
    RequestError,
)
from lightning_edit.core.locator import ModelTree
from lightning_edit.data import EditDataModule
from lightning_edit.demos import (
    tiny_model,
    tiny_requests,
    tiny_tokenizer,
    trained_tiny_model,
)
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.locate_then_edit.contexts import Contexts
from lightning_edit.passes.sampling import sample_templates
from tests import zoo
from tests.modules.helpers import bare_trainer, same, snapshot


class Several(LocateModule):
    """A method that edits several layers."""

    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        return WeightDelta({})


def several(**settings: Any) -> Several:
    return Several.from_model(tiny_model(), tiny_tokenizer(), **settings)


def editor_of(model: Any = None, **settings: Any) -> ROME:
    model = tiny_model() if model is None else model
    return ROME.from_model(model, tiny_tokenizer(), **{"steps": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_templates": ["{}", "Yes."]}, r"`context_templates`: 'Yes\.' .* end in \{\}"),
        (
            {"search": "newton"},
            r"`search` is expected to be one of adam, gauss_newton, but got 'newton'",
        ),
        ({"context_templates": ["Yes. {}"]}, r"`context_templates`: the first .* '\{\}'"),
        (
            {"context_templates": ["{}", ["Yes. {}"]]},
            r"`context_templates` .* list\[str\] or list\[list\[str\]\]",
        ),
        ({"context_templates": [["{}"], []]}, "`context_templates`: .* leave no group empty"),
        ({"kl_prompt": "It is a"}, r"`kl_prompt` .* \{\}"),
        ({"steps": 0}, "`steps` .* at least 1, but got 0"),
        ({"tokens_per_dimension": 0}, "`tokens_per_dimension` .* at least 1, but got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROME(**settings)


def test_layers_that_do_not_exist_are_refused_before_the_model_is_touched() -> None:
    model = tiny_model()
    with pytest.raises(LocatorError, match=r"Layer 9 does not exist.*0 to 3"):
        editor_of(model, layers=[9])
    assert all(p.requires_grad for p in model.parameters())


def test_rome_edits_one_layer() -> None:
    model = tiny_model()
    with pytest.raises(LocatorError, match="ROME edits one layer, but `layers` names 2"):
        editor_of(model, layers=[1, 2])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", zoo.ENCODER_DECODERS)
def test_models_with_an_encoder_are_refused_by_name(kind: str) -> None:
    model = zoo.build(kind)
    with pytest.raises(ModelError, match=r"ROME needs a decoder-only model.*has an encoder"):
        editor_of(model)


def test_negative_layers_count_from_the_end() -> None:
    model = tiny_model()
    edit = editor_of(model, layers=[-1], context_templates=["{}"]).edit(tiny_requests(1))
    assert list(edit.changes) == ["model.layers.3.mlp.down_proj.weight"]


@pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning")
def test_templates_are_sampled_once_from_the_unedited_model() -> None:
    model, tokenizer = trained_tiny_model()
    wanted = ["{}", *sample_templates(model, editor_of(model).tokens, seed=3)]
    editor = ROME.from_model(model, tokenizer, seed=3, steps=2)
    # An edited model would write other contexts.
    request = tiny_requests(1)[0]
    editor.edit_optimizer.stage(editor.edit(request) * 20.0)
    editor.edit_optimizer.step()
    edited = snapshot(model)
    assert sample_templates(model, editor.tokens, seed=3) != wanted[1:]
    editor.contexts = Contexts(None, editor.sample_contexts)
    assert editor.templates == wanted
    assert same(model, edited)
    assert editor.template_groups is editor.template_groups


def test_sampled_templates_have_the_lengths_of_the_paper_and_leave_the_seed_alone() -> None:
    editor = editor_of()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    templates = sample_templates(editor.model, editor.tokens, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(templates) == 20
    assert all(template.endswith(". {}") for template in templates)
    assert templates == sample_templates(editor.model, editor.tokens, seed=0)
    assert templates != sample_templates(editor.model, editor.tokens, seed=1)


def test_pinned_templates_are_taken_as_they_are() -> None:
    editor = editor_of(context_templates=["{}", "Yes. {}"])
    assert editor.templates == ["{}", "Yes. {}"]
    assert editor.edit_state()["context_templates"] == [["{}", "Yes. {}"]]
    nested = editor_of(context_templates=[["{}"], ["Yes. {}", "No. {}"]])
    assert nested.templates == ["{}", "Yes. {}", "No. {}"]
    keys_TM = torch.tensor([[8.0], [1.0], [3.0]])
    assert nested.mean_keys(keys_TM).tolist() == [5.0]  # a half of 8, a quarter of 1 and of 3
    assert editor.mean_keys(keys_TM[:2]).tolist() == [4.5]


def test_the_state_carries_templates_to_a_resumed_run() -> None:
    editor = editor_of(seed=3)
    resumed = editor_of()
    resumed.load_edit_state(editor.edit_state())
    assert resumed.templates == editor.templates


def test_a_second_moment_can_be_given() -> None:
    editor = several(layers=[1, 2])
    moment = torch.eye(128, dtype=torch.float64)
    editor.set_second_moment(-2, moment)
    assert torch.equal(editor.second_moment(2), torch.eye(128))
    for layer, shape in ((0, (128, 128)), (1, (32, 32))):
        with pytest.raises(LocatorError, match=r"for one of the layers \[1, 2\]"):
            editor.set_second_moment(layer, torch.eye(shape[0]))


def test_a_second_moment_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "moments.safetensors"
    moments = {f"model.layers.{layer}.mlp.down_proj": torch.eye(128) * layer for layer in (1, 2)}
    save_file(moments, file)
    editor = several(layers=[2, 1], second_moment=str(file))
    assert torch.equal(editor.second_moment(2), 2 * torch.eye(128))
    assert torch.equal(editor.second_moment(1), torch.eye(128))
    with pytest.raises(ArtifactError, match=r"has no tensor `model\.layers\.3\.mlp\.down_proj`"):
        editor_of(layers=[3], second_moment=str(file)).second_moment(3)
    file.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="cannot read"):
        editor_of(layers=[1], second_moment=str(file)).second_moment(1)
    with pytest.raises(ArtifactError, match="cannot read"):
        editor_of(layers=[1], second_moment=str(tmp_path / "missing")).second_moment(1)


def test_a_second_moment_that_is_given_stays_when_others_are_found(tmp_path: Path) -> None:
    file = tmp_path / "moments.safetensors"
    save_file({f"model.layers.{i}.mlp.down_proj": torch.eye(128) * i for i in (1, 2)}, file)
    given = torch.eye(128) * 5
    for settings in ({"second_moment": str(file)}, {"tokens_per_dimension": 1}):
        editor = several(layers=[1, 2], cache_dir=str(tmp_path), **settings)
        editor.set_second_moment(1, given)
        assert editor.second_moment(2)[0, 0] != 5
        assert torch.equal(editor.second_moment(1), torch.eye(128) * 5)
        assert torch.equal(editor.second_moment(-3), editor.second_moment(1))
        with pytest.raises(LocatorError, match=r"Layer 3 has no second moment.* layers \[1, 2\]"):
            editor.second_moment(3)
    given.zero_()  # what was given is a copy
    assert editor.second_moment(1)[0, 0] == 5


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((0, 5, float("nan")), "layer 1 has entries that are not finite"),
        ((3, 3, float("inf")), "layer 1 has entries that are not finite"),
        ((0, 5, 0.5), "layer 1 is not symmetric. Give the whole"),
        ((2, 2, -0.1), r"layer 1 has diagonal entries from -0\.1 to 1"),
    ],
)
def test_what_cannot_be_a_second_moment_is_refused_by_name(
    entry: tuple[int, int, float], message: str, tmp_path: Path
) -> None:
    row, column, value = entry
    moment = torch.eye(128)
    moment[row, column] = value
    editor = several(layers=[1])
    with pytest.raises(ArtifactError, match=message):
        editor.set_second_moment(1, moment)
    file = tmp_path / "moments.safetensors"
    save_file({"model.layers.1.mlp.down_proj": moment}, file)
    with pytest.raises(ArtifactError, match=message):
        several(layers=[1], second_moment=str(file)).second_moment(1)
    with pytest.raises(ArtifactError, match="layer 1 has diagonal entries from 0 to 0"):
        editor.set_second_moment(1, torch.zeros(128, 128))
    rounded = torch.eye(128)
    rounded[0, 5] = 1e-5
    editor.set_second_moment(1, rounded)
    assert torch.equal(editor.second_moment(1), rounded)


@pytest.mark.parametrize("cls", [ROME, MEMIT, PMET, EMMET, AlphaEdit])
def test_a_second_moment_that_a_method_cannot_use_is_refused_before_anything_is_written(
    cls: type[LocateModule],
) -> None:
    model = tiny_model()
    kept = snapshot(model)
    editor = cls.from_model(model, tiny_tokenizer(), layers=[1], steps=2, context_templates=["{}"])
    # Of rank one, which AlphaEdit can use; and with a negative eigenvalue, which nothing can.
    editor.set_second_moment(1, torch.ones(128, 128))
    request = tiny_requests(1)
    if cls is AlphaEdit:
        editor.edit(request)
    else:
        with pytest.raises(ArtifactError, match=r"second moment of layer 1: .* too few tokens"):
            editor.edit(request)
    editor.set_second_moment(1, 2 * torch.ones(128, 128) - torch.eye(128))
    with pytest.raises(ArtifactError, match=r"second moment of layer 1: `second_moment` is exp"):
        editor.edit(request)
    assert same(model, kept)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(ROME, {}), (MEMIT, {"moment_weight": 0.3}), (PMET, {}), (EMMET, {}), (AlphaEdit, {})],
)
def test_edits_follow_the_second_moment_that_was_given_last(
    cls: type[LocateModule], settings: dict[str, Any]
) -> None:
    model, request = tiny_model(), tiny_requests(1)
    slopes = [torch.linspace(1, steepest, 128).diag() for steepest in (3.0, 30.0)]

    def editor_with(moment: torch.Tensor) -> LocateModule:
        editor = cls.from_model(
            model, tiny_tokenizer(), layers=[1], steps=2, context_templates=["{}"], **settings
        )
        editor.set_second_moment(1, moment)
        return editor

    editor = editor_with(slopes[0])
    first = editor.edit(request)
    editor.set_second_moment(1, slopes[1])
    second = editor.edit(request)
    wanted = editor_with(slopes[1]).edit(request)
    assert (first - wanted).norm() > 0.01 * wanted.norm()
    assert all(torch.equal(second.dense(n), wanted.dense(n)) for n in wanted.changes)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (EMMET, "moment_weight", 3.0),
        (EMMET, "norm_weight", 0.5),
        (AlphaEdit, "protected_share", 0.3),
        (AlphaEdit, "nullspace_threshold", 2.0),
    ],
)
def test_edits_follow_settings_that_change_between_them(
    cls: type[LocateModule], name: str, value: float
) -> None:
    model, request = tiny_model(), tiny_requests(1)

    def editor_with(**settings: Any) -> LocateModule:
        editor = cls.from_model(
            model, tiny_tokenizer(), layers=[1], steps=2, context_templates=["{}"], **settings
        )
        editor.set_second_moment(1, torch.linspace(1, 3, 128).diag())
        return editor

    softness = {"softness": 0.5} if cls is EMMET else {}
    editor = editor_with(**softness)
    first = editor.edit(request)
    setattr(editor, name, value)
    second = editor.edit(request)
    wanted = editor_with(**softness, **{name: value}).edit(request)
    assert (first - wanted).norm() > 1e-3 * wanted.norm()
    assert all(torch.equal(second.dense(n), wanted.dense(n)) for n in wanted.changes)


def test_second_moments_are_of_the_unedited_model(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "layers": [1, 2],
        "tokens_per_dimension": 1,
        "context_templates": ["{}"],
    }
    fresh = several(cache_dir=str(tmp_path / "a"), **settings)
    wanted = fresh.second_moment(2)
    editor = several(cache_dir=str(tmp_path / "b"), **settings)
    edit = editor_of(layers=[1], context_templates=["{}"], second_moment=None)
    edit.set_second_moment(1, torch.eye(128))
    editor.edit_optimizer.stage(edit.edit(tiny_requests(1)) * 50.0)
    editor.edit_optimizer.step()
    edited = snapshot(editor.model)
    assert torch.equal(editor.second_moment(2), wanted)
    assert same(editor.model, edited)
    # Files are named by the hash of the base, so both would find each other's.
    names = [sorted(f.name for f in tmp_path.glob(f"{part}/second_moments/*")) for part in "ab"]
    assert names[0] == names[1]
    assert len(names[0]) == 2


def test_the_default_layer_is_in_the_lower_part() -> None:
    for kind in ("llama", "gpt2"):
        tree = ModelTree.of(zoo.build(kind))
        [layer] = editor_of(zoo.build(kind)).default_layers(tree)
        assert 0 <= layer < len(tree.blocks) / 2


EDITORS: list[tuple[type[LocateModule], dict[str, Any]]] = [
    (ROME, {"layers": [1]}),
    (MEMIT, {"layers": [0, 1], "moment_weight": 0.3}),
    (PMET, {"layers": [0, 1], "moment_weight": 0.3}),
    (AlphaEdit, {"layers": [0, 1], "aligned": True}),
]
OTHERS = [request for request in tiny_requests(6) if request.subject != "Mirel"][:2]


def half_broken(cls: type[LocateModule], settings: dict[str, Any]) -> tuple[Any, EditRequest]:
    """An editor, and a request with a word that the model has no sound embedding of."""
    model = zoo.build("llama")
    strange = EditRequest("Qum lies on the", "Qum", "Brune", id="strange")
    tokens = tiny_tokenizer()
    known = {i for r in OTHERS for i in tokens(f"{r.prompt} {r.target_new}").input_ids}
    token = next(i for i in tokens(strange.prompt).input_ids if i not in known)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    given = {"steps": 3, "context_templates": ["{}", "It is. {}"], **settings}
    editor = cls.from_model(model, tokens, **given)
    for site in editor.sites(editor.tree):
        editor.set_second_moment(site.layer, torch.eye(site.in_features))
    return editor, strange


@pytest.mark.parametrize(("cls", "settings"), EDITORS, ids=[e.__name__ for e, _ in EDITORS])
def test_a_request_that_fails_is_left_out_and_named(
    cls: type[LocateModule], settings: dict[str, Any]
) -> None:
    editor, strange = half_broken(cls, settings)
    wanted = editor.edit(OTHERS)
    with pytest.warns(UserWarning, match=r"'strange' is left out of its batch: .* not finite"):
        edit = editor.edit([OTHERS[0], strange, OTHERS[1]])
    assert edit.provenance.request_ids == tuple(r.id for r in OTHERS)
    assert list(edit.details["failed"]) == ["strange"]
    assert [row["id"] for row in edit.details["requests"]] == [r.id for r in OTHERS]
    assert (edit - wanted).norm() < 1e-4 * wanted.norm()
    with pytest.raises(FailedRequestsError, match=r"Request 'strange': the loss .* Lower `lr`"):
        editor.edit(strange)


@pytest.mark.parametrize(("cls", "settings"), EDITORS, ids=[e.__name__ for e, _ in EDITORS])
@pytest.mark.filterwarnings("ignore:Nothing is written:UserWarning")
@pytest.mark.filterwarnings("ignore:.*update direction:UserWarning")
def test_runs_go_on_behind_a_request_that_fails(
    cls: type[LocateModule], settings: dict[str, Any]
) -> None:
    editor, strange = half_broken(cls, settings)
    data = EditDataModule(requests=[OTHERS[0], strange, OTHERS[1]], batch_size=1)
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(editor, datamodule=data)
    assert trainer.global_step == 3
    assert [row["id"] for row in editor.history] == [OTHERS[0].id, "strange", OTHERS[1].id]
    assert "not finite at pass 1" in editor.history[1]["failed"]
    assert "failed" not in editor.history[2]
    assert editor.delta.provenance.request_ids == tuple(r.id for r in OTHERS)
    other, _ = half_broken(cls, settings)
    bare_trainer(max_epochs=1).fit(other, datamodule=EditDataModule(requests=OTHERS, batch_size=1))
    assert (editor.delta - other.delta).norm() < 1e-5 * other.delta.norm()


def test_a_test_measures_the_request_that_fails_as_not_written() -> None:
    editor, strange = half_broken(MEMIT, {"layers": [0, 1], "moment_weight": 0.3})
    kept = snapshot(editor.model)
    data = EditDataModule(requests=[OTHERS[0], strange], eval_batch_size=2)
    trainer = bare_trainer()
    with pytest.warns(UserWarning, match="Nothing is written"):
        trainer.test(editor, datamodule=data, verbose=False)
    names = [n for n, p in editor.model.named_parameters() if bool(p.isfinite().all())]
    assert all(torch.equal(editor.model.get_parameter(n), kept[n]) for n in names)
    assert 0 <= float(trainer.callback_metrics["test/reliability/teacher_forced"]) <= 1


def test_a_subject_that_occurs_twice_is_told() -> None:
    editor = editor_of(layers=[1], context_templates=["{}"])
    request = EditRequest("Dorin is near Dorin and lies on the", "Dorin", "Brune", id="twice")
    with pytest.warns(UserWarning, match=r"'twice': the subject 'Dorin' occurs 2 times"):
        editor.edit(request)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_requests_longer_than_the_context_are_refused_by_name(kind: str) -> None:
    model = zoo.build(kind)
    kept = snapshot(model)
    limit = model.config.max_position_embeddings
    editor: Any = ROME.from_model(
        model, tiny_tokenizer(), layers=[1], steps=2, context_templates=["{}", "so " * 90 + "{}"]
    )
    editor.set_second_moment(1, torch.eye(editor.sites(editor.tree)[0].in_features))
    long = EditRequest("Dorin lies on the", "Dorin", "Brune " * limit, id="long")
    with pytest.raises(
        RequestError, match=rf"'long': .* positions for {limit}. Shorten the target"
    ):
        editor.edit(long)
    tokens = editor.tokens
    tokens.max_length = len(tokens.prompt("Dorin lies on the")) + 30
    short = EditRequest("Dorin lies on the", "Dorin", "Brune", id="short")
    with pytest.raises(RequestError, match=r"'short': .* behind the context 'so so .* the prompt"):
        editor.edit(short)
    assert same(model, kept)


@pytest.mark.parametrize("method", [ROME, MEMIT, PMET, EMMET, AlphaEdit])
def test_values_are_searched_as_asked(method: Any) -> None:
    model, tokenizer = trained_tiny_model()
    given: dict[str, Any] = {"layers": [1], "context_templates": ["{}"], "steps": 6}
    losses = {}
    for search in ("adam", "gauss_newton"):
        editor = method.from_model(model, tokenizer, search=search, **given)
        editor.set_second_moment(1, torch.eye(128))
        edit = editor.edit(tiny_requests(1)[0])
        losses[search] = edit.details["requests"][0]["searched_loss"]
        assert editor.hparams["search"] == search
    assert losses["gauss_newton"] < losses["adam"]
