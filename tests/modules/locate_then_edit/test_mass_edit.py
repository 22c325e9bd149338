# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MEMIT, EMMET and AlphaEdit against plain implementations that run the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit import EMMET, MEMIT, RROME, AlphaEdit, EditRequest
from lightning_edit.core.batch import EditBatch
from lightning_edit.core.locator import ModelTree
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.functional.least_squares import key_strengths
from lightning_edit.modules.locate_then_edit import moments
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.locate_then_edit.earlier_edits import EarlierEdits
from tests import zoo
from tests.modules.helpers import bare_trainer, same, snapshot
from tests.modules.locate_then_edit.test_rome import covariances

FAMILIES = ("llama", "gpt2", "gptj", "gptneox", "opt", "gemma2", "qwen3", "falcon")
GROUPS = [["{}"], ["It is said. {}", "A longer beginning: {}"]]
LAYERS = [0, 1]
REQUESTS = (
    tiny_requests(1)[0],
    EditRequest("Dorin lies on the", "Dorin", "Brune", id="begins"),
    EditRequest("People in Old Quill speak", "Old Quill", "Ostrish", id="several"),
)
METHODS: list[tuple[type[LocateModule], dict[str, Any]]] = [
    (MEMIT, {"moment_weight": 0.3}),
    (EMMET, {"layers": [1]}),
    (AlphaEdit, {"ridge_weight": 0.2}),
]


def moment_of(width: int, layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(layer)
    keys = torch.randn(4 * width, width, generator=generator) * torch.linspace(1.5, 0.2, width)
    return keys.T @ keys / len(keys) + 0.05 * torch.eye(width)


def editor_of(cls: type[LocateModule], model: Any, **settings: Any) -> Any:
    given = {"layers": LAYERS, "steps": 4, "context_templates": GROUPS, **settings}
    editor = cls.from_model(model, tiny_tokenizer(), **given)
    for site in editor.sites(editor.tree):
        editor.set_second_moment(site.layer, moment_of(site.in_features, site.layer))
    return editor


def plain(editor: Any, request: EditRequest, layer: int) -> tuple[Tensor, Tensor]:
    """Averaged key at a layer, and the last edited layer's residual stream, by the whole model."""
    model: Any = editor.model
    tree = ModelTree.of(model)
    means, hidden = [], []
    for group in GROUPS:
        keys = []
        for template in group:
            ids, last = editor.tokens.subject_last(request.prompt, request.subject, template[:-2])
            seen: dict[str, Tensor] = {}

            def take_key(
                _: nn.Module, args: Any, seen: Any = seen, last: int = last, n: int = len(ids)
            ) -> None:
                seen["key"] = args[0].reshape(n, -1)[last].clone()

            def take_state(
                _: nn.Module, __: Any, output: Any, seen: Any = seen, last: int = last
            ) -> None:
                whole = output[0] if isinstance(output, tuple) else output
                seen["state"] = whole[0, last].clone()

            top = editor.sites(tree)[-1].layer
            hooks = [
                tree.mlp_out(layer).module(model).register_forward_pre_hook(take_key),
                tree.blocks[top].register_forward_hook(take_state),
            ]
            with torch.no_grad():
                model(input_ids=torch.tensor([list(ids)]))
            for hook in hooks:
                hook.remove()
            keys.append(seen["key"])
            hidden.append(seen["state"])
        means.append(torch.stack(keys).mean(0))
    return torch.stack(means).mean(0), hidden[0]


def plain_update(editor: Any, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
    """ΔW of one layer from the papers' formulas, by dense float64 solves of the inputs' system."""
    k, r = keys.double().T, residuals.double().T
    moment = moment_of(k.shape[0], layer).double()
    eye = torch.eye(k.shape[0]).double()
    if isinstance(editor, MEMIT):
        memit: Tensor = r @ k.T @ torch.linalg.inv(0.3 * moment + k @ k.T)
        return memit
    if isinstance(editor, EMMET):
        inverse = torch.linalg.inv(moment)
        emmet: Tensor = r @ torch.linalg.inv(k.T @ inverse @ k) @ k.T @ inverse
        return emmet
    directions = editor.protected(layer)[0].double()
    project = eye - directions @ directions.T
    alpha: Tensor = torch.linalg.solve(project @ k @ k.T + 0.2 * eye, project @ k @ r.T).T
    return alpha


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("cls", "settings"), METHODS, ids=[m.__name__ for m, _ in METHODS])
def test_layers_are_written_as_the_papers_say(
    cls: type[LocateModule], settings: dict[str, Any], kind: str
) -> None:
    model = zoo.build(kind)
    editor = editor_of(cls, model, **settings)
    kept = snapshot(model)
    edit = editor.edit(REQUESTS)
    assert same(model, kept)
    values = edit.details["target_values"].values
    sites = editor.sites(editor.tree)
    with torch.no_grad():
        for i, site in enumerate(sites):
            found = [plain(editor, request, site.layer) for request in REQUESTS]
            keys, hidden = (torch.stack(part) for part in zip(*found, strict=True))
            residuals = (values - hidden) / (len(sites) - i)
            torch.testing.assert_close(edit.details["keys"][site.layer], keys, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(
                edit.details["residuals"][site.layer], residuals, rtol=1e-3, atol=1e-4
            )
            wanted = site.orient(plain_update(editor, site.layer, keys, residuals)).float()
            change = edit.dense(site.name)
            assert (change - wanted).norm() < 2e-3 * wanted.norm()
            # Layers above are asked with this one written.
            site.parameter(model).add_(wanted)
    assert [row["id"] for row in edit.details["requests"]] == [r.id for r in REQUESTS]
    assert all(0 < row["written_share"] <= 1 for row in edit.details["requests"])


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_keys_may_be_taken_in_turns(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    wanted = editor_of(AlphaEdit, model).edit(REQUESTS)
    monkeypatch.setattr("lightning_edit.passes.key_pass.MAX_ROWS", rows)
    found = editor_of(AlphaEdit, model).edit(REQUESTS)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    for name, tensor in wanted.carried.items():
        torch.testing.assert_close(found.carried[name], tensor, rtol=1e-4, atol=1e-5)


def test_target_values_are_residual_streams() -> None:
    model = zoo.build("llama")
    editor = editor_of(MEMIT, model)
    found = editor.edit(REQUESTS).details["target_values"]
    for e, request in enumerate(REQUESTS):
        _, hidden = plain(editor, request, LAYERS[-1])
        torch.testing.assert_close(found.outputs[e, 0], hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softness", [0.0, 0.4])
def test_emmet_stores_every_pair_or_is_memit(softness: float) -> None:
    model = zoo.build("llama")
    settings = {"layers": [1], "steps": 3}
    edit = editor_of(EMMET, model, softness=softness, moment_weight=2.0, **settings).edit(REQUESTS)
    keys, residuals = edit.details["keys"][1], edit.details["residuals"][1]
    change = edit.dense("model.layers.1.mlp.down_proj.weight")
    if softness == 0:
        torch.testing.assert_close(keys @ change.T, residuals, rtol=1e-3, atol=1e-4)
    else:
        memit = editor_of(MEMIT, model, moment_weight=2.0 * softness, **settings).edit(REQUESTS)
        other = memit.dense("model.layers.1.mlp.down_proj.weight")
        assert (change - other).norm() < 1e-4 * other.norm()


def test_alpha_edit_leaves_protected_directions_alone() -> None:
    editor = editor_of(AlphaEdit, zoo.build("llama"))
    edit = editor.edit(REQUESTS)
    for site in editor.sites(editor.tree):
        change = edit.dense(site.name)
        assert change.norm() > 1e-3
        assert (change @ editor.protected(site.layer)[0]).norm() < 1e-5 * change.norm()


def test_alpha_edit_carries_keys_of_the_edited_model() -> None:
    model = zoo.build("llama")
    editor = editor_of(AlphaEdit, model)
    edit = editor.edit(REQUESTS)
    assert not editor.carried
    editor.edit_optimizer.stage(edit)
    editor.edit_optimizer.step()
    batch = EditBatch.from_requests(list(REQUESTS), editor.tokens)
    now = editor.layer_keys(batch)
    for layer in LAYERS:
        torch.testing.assert_close(editor.carried[f"keys/{layer}"], now[layer].T)
    second = editor.edit(tiny_requests(3)[1:])
    assert second.carried["keys/1"].shape[1] == 5


def test_many_remembered_keys_become_one_matrix() -> None:
    width = 8  # of which no key waits beside their sum
    keys = torch.randn(width // 2, width, generator=torch.Generator().manual_seed(0))
    few = EarlierEdits().with_keys(keys).pack(1)
    assert list(few) == ["keys/1"]
    assert few["keys/1"].shape == (width, width // 2)
    many = EarlierEdits.unpack(few, 1).with_keys(keys).pack(1)
    assert many["keys/1"].shape == (width, 0)
    torch.testing.assert_close(many["gram/1"], 2 * keys.double().T @ keys.double())
    more = EarlierEdits.unpack(many, 1).with_keys(keys[:1])
    assert more.joined(keys).shape == (width, len(keys))
    torch.testing.assert_close(more.gram, many["gram/1"] + keys[:1].double().T @ keys[:1].double())


@pytest.mark.parametrize(("cls", "settings"), [METHODS[0], METHODS[2]], ids=["MEMIT", "AlphaEdit"])
def test_aligned_batches_one_after_another_are_their_union(
    cls: type[LocateModule], settings: dict[str, Any]
) -> None:
    requests = tiny_requests(6)

    def total(sizes: Sequence[int], aligned: bool = True) -> Any:
        model, _ = trained_tiny_model()
        editor = editor_of(cls, model, aligned=aligned, **settings)
        rest = list(requests)
        for size in sizes:
            editor.edit_optimizer.stage(editor.edit(rest[:size]))
            editor.edit_optimizer.step()
            rest = rest[size:]
        return editor.delta

    at_once, in_turn = total([6]), total([2, 3, 1])
    plain_turns = total([2, 3, 1], aligned=False)
    assert (at_once - in_turn).norm() < 1e-3 * at_once.norm()
    assert (at_once - plain_turns).norm() > 0.02 * at_once.norm()


def test_the_weight_is_chosen_once_so_that_pairs_are_written() -> None:
    model, _ = trained_tiny_model()
    editor = editor_of(MEMIT, model, written_share=0.8)
    edit = editor.edit(tiny_requests(3))
    for layer in LAYERS:
        shares = edit.details["figures"][layer]["written_share"]
        assert float(shares.median()) == pytest.approx(0.8)
        strength = key_strengths(edit.details["keys"][layer].T, editor.factor(layer))
        weight = float(edit.carried[f"weight/{layer}"])
        assert float(strength.median()) * 0.25 == pytest.approx(weight)
    editor.edit_optimizer.stage(edit)
    editor.edit_optimizer.step()
    later = editor.edit(tiny_requests(5)[3:])
    assert later.carried["weight/1"] == edit.carried["weight/1"]


def test_batches_teach_the_tiny_world() -> None:
    model, tokenizer = trained_tiny_model()
    requests = tiny_requests(4)[1::2]  # two subjects
    plans: tuple[tuple[Any, dict[str, Any]], ...] = (
        (MEMIT, {"written_share": 0.99}),
        (EMMET, {}),
        (AlphaEdit, {"ridge_weight": 0.01}),
    )
    for cls, further in plans:
        settings = {
            **further,
            "layers": [1],
            "tokens_per_dimension": 8,
            "context_templates": GROUPS,
        }
        editor = cls.from_model(model, tokenizer, steps=25, **settings)
        evaluator = editor.evaluator
        before = evaluator.evaluate(requests).mean("reliability/nll_new")[0]
        with editor.edit(requests).applied(model):
            after = evaluator.evaluate(requests).mean("reliability/nll_new")[0]
        assert after < 0.3 * before, cls.__name__


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (MEMIT, {"moment_weight": -1.0}, "`moment_weight` .* at least 0, but got -1"),
        (MEMIT, {"written_share": 1.0}, "`written_share` .* between 0 and 1"),
        (EMMET, {"softness": -1.0}, "`softness` and `norm_weight`"),
        (AlphaEdit, {"ridge_weight": 0.0}, "`ridge_weight` .* above 0"),
        (AlphaEdit, {"protected_share": 0.0}, "`protected_share` .* between 0 and 1"),
        (RROME, {"key": "mean"}, "`key` .* one of averaged, prompt, but got 'mean'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    cls: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**settings)


@pytest.mark.parametrize("key", ["averaged", "prompt"])
def test_r_rome_uses_one_key(key: str) -> None:
    model = zoo.build("llama")
    editor: Any = RROME.from_model(
        model, tiny_tokenizer(), layers=[1], steps=4, context_templates=GROUPS, key=key
    )
    moment = moment_of(editor.tree.mlp_out(1).in_features, 1)
    editor.set_second_moment(1, moment)
    request = REQUESTS[2]
    edit = editor.edit(request)
    found = edit.details["target_values"]
    keys, outputs = found.keys[0], found.outputs[0]
    if key == "averaged":
        k = keys[0] / 2 + keys[1:].mean(0) / 2
        lacking = found.values[0] - outputs[0] / 2 - outputs[1:].mean(0) / 2
    else:
        k, lacking = keys[0], found.deltas[0]
    u = torch.linalg.solve(moment.double(), k.double())
    wanted = torch.outer(lacking.double(), u) / (u @ k.double())
    change = edit.dense("model.layers.1.mlp.down_proj.weight")
    torch.testing.assert_close(change.double(), wanted, rtol=1e-3, atol=1e-5)


def test_a_run_commits_batches_and_resumes(tmp_path: Path) -> None:
    from lightning_edit import EditCheckpoint

    def run(epochs_of: int, ckpt: str | None = None) -> Any:
        model, _ = trained_tiny_model()
        editor = editor_of(AlphaEdit, model)
        data = EditDataModule(requests=tiny_requests(6), batch_size=2)
        trainer = bare_trainer(
            max_epochs=1,
            max_steps=epochs_of,
            callbacks=[EditCheckpoint(dirpath=str(tmp_path))],
            enable_checkpointing=True,
            default_root_dir=tmp_path,
        )
        trainer.fit(editor, datamodule=data, ckpt_path=ckpt)
        return editor

    whole = run(-1)
    for file in tmp_path.glob("*.ckpt"):
        file.unlink()
    run(2)
    resumed = run(-1, "last")
    assert same(resumed.model, snapshot(whole.model))
    assert resumed.carried.keys() == whole.carried.keys()
    for name, tensor in whole.carried.items():
        assert torch.equal(tensor, resumed.carried[name])


@pytest.mark.real
def test_strengths_and_null_spaces_of_the_default_model(default_model: tuple[Any, Any]) -> None:
    """Figures of the original code, with a second moment of pinned random tokens."""
    model, tokenizer = default_model
    requests = [
        EditRequest("The capital of {} is", "France", "Rome"),
        EditRequest("{} is located in the city of", "The Louvre", "Berlin"),
        EditRequest("{} is located in the country of", "The Great Wall", "South Korea"),
        EditRequest("The mother tongue of {} is", "Angela Merkel", "French"),
    ]
    groups = [["{}"], ["Today. {}", "In short: {}", "The report said that {}"]]
    editor: Any = AlphaEdit.from_model(
        model, tokenizer, layers=[7], context_templates=groups, nullspace_threshold=2e-2
    )
    editor.set_second_moment(7, covariances(model)["random_tokens"])
    keys = editor.layer_keys(EditBatch.from_requests(requests, editor.tokens))
    strength = key_strengths(keys[7].T, editor.factor(7))
    assert strength.tolist() == pytest.approx([2115, 9304, 11499, 17174], rel=2e-4)
    assert 1536 - editor.protected(7)[0].shape[1] == 1217


def test_what_edits_carry_is_new_by_their_keys_alone_most_times() -> None:
    earlier, keys, new = EarlierEdits(), torch.randn(400, 64), 0
    for key in keys:
        later = earlier.with_keys(key[None])
        new += later.gram is not None and later.gram is not earlier.gram
        earlier = later
    assert earlier.keys is not None
    assert earlier.gram is not None
    assert earlier.keys.shape[1] <= 64 // 16
    assert new < 400 / 4
    whole = earlier.keys.double() @ earlier.keys.double().T + earlier.gram
    torch.testing.assert_close(whole, keys.double().T @ keys.double())


def test_a_later_run_reads_the_protected_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "_COSTLY", 100)
    model, tokenizer = trained_tiny_model()
    moment = torch.diag(torch.linspace(1, 2, 128))
    count, eigh = 0, torch.linalg.eigh

    def counted(matrix: Tensor) -> Any:
        nonlocal count
        count += 1
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)

    def protected(share: float) -> tuple[Tensor, float]:
        editor = AlphaEdit.from_model(
            model, tokenizer, layers=[1], cache_dir=str(tmp_path), protected_share=share
        )
        editor.set_second_moment(1, moment)
        editor.protected(1)
        return editor.protected(1)

    first, again = protected(0.7), protected(0.7)
    assert count == 1
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    protected(0.5)
    assert count == 2
    [file, _] = sorted((tmp_path / "second_moments").glob("*-0.?.safetensors"))
    file.write_bytes(b"damaged")
    protected(0.5)
    assert count == 3
