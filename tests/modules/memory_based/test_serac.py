# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""SERAC: its losses by the formulas, its training, and what becomes of its edits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_edit import (
    SERAC,
    EditCheckpoint,
    EditDataModule,
    EditMemory,
    EditRequest,
    MemoryWrite,
    TrainedEditor,
)
from lightning_edit.core.errors import ArtifactError, EditError, ModelError, RequestError
from lightning_edit.core.processes import Processes
from lightning_edit.demos import (
    WORLD,
    tiny_model,
    tiny_requests,
    tiny_tokenizer,
    trained_tiny_model,
)
from lightning_edit.evaluation.scoring import continuations
from lightning_edit.functional.scope import chosen_edits, scope_distances, scope_loss
from tests import zoo
from tests.modules.helpers import bare_trainer, fingerprint, plain_nll, same, same_edit, snapshot


def _batches() -> list[list[EditRequest]]:
    """Every fact with every answer of its relation but its own and that of `tiny_requests`.

    Flags have too few colors for that.
    """
    facts, batches = tiny_requests(24), []
    for step in range(2, 6):
        requests = []
        for fact, request in zip(WORLD, facts, strict=True):
            kin = [other for other in WORLD if other.relation == fact.relation]
            new = kin[(kin.index(fact) + step) % len(kin)].answer
            if fact.relation != "flag" and new not in (fact.answer, request.target_new):
                requests.append(replace(request, target_new=new, id=f"{request.id}-{step}"))
        batches += [requests[i : i + 12] for i in range(0, len(requests), 12)]
    return batches


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """A checkpoint of a SERAC that answers in the tiny world, and how its losses went."""
    torch.manual_seed(0)
    editor = SERAC.from_model(
        *trained_tiny_model(),
        layers=[1, 2, 3],
        width=32,
        rank=16,
        lr=5e-3,
        encoder_lr=2e-3,
        edit_weight=1.0,
        use_all_negatives=True,
        cross_negatives=True,
    )
    batches: Any = DataLoader(_batches(), batch_size=None)  # type: ignore[arg-type]
    figures = [editor.edit_loss(_batches()[0])[1]]
    trainer = bare_trainer(max_epochs=20)
    trainer.fit(editor, batches, batches)
    figures.append(editor.edit_loss(_batches()[0])[1])
    path = tmp_path_factory.mktemp("serac") / "serac.ckpt"
    trainer.save_checkpoint(path)
    return path, figures


@pytest.fixture
def editor(trained: tuple[Path, Any]) -> Any:
    return TrainedEditor.from_model(*trained_tiny_model(), checkpoint=str(trained[0]))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a text encoder with a tokenizer of its own, with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = {name: i for i, name in enumerate(["<pad>", "<unk>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106 (no password)
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64)
    fast.add_special_tokens({"pad_token": "<pad>", "unk_token": "<unk>"})
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def _commit(editor: Any, requests: list[EditRequest]) -> Any:
    edit = editor.edit(requests)
    editor.edit_optimizer.stage(edit)
    editor.edit_optimizer.step()
    return edit


# -- formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_similarities_are_those_of_the_formulas(distance: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, edits = (torch.randn(n, 4, generator=generator) for n in (3, 2))
    found = torch.exp(-scope_distances(queries, edits, distance, 0.5))
    for b, q in enumerate(queries.tolist()):
        for n, z in enumerate(edits.tolist()):
            if distance == "euclidean":
                d = sum((x - y) ** 2 for x, y in zip(q, z, strict=True))
            else:
                lengths = math.hypot(*q) * math.hypot(*z)
                d = 1 - sum(x * y for x, y in zip(q, z, strict=True)) / lengths
            assert float(found[b, n]) == pytest.approx(math.exp(-0.5 * d), rel=1e-5)


def test_rounding_makes_no_distance_negative() -> None:
    unit = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    for distance in ("euclidean", "cosine"):
        assert float(scope_distances(unit, unit, distance).min()) >= 0


def test_both_sides_of_the_cross_entropy_count_alike() -> None:
    inside, outside = [0.1, 2.0], [0.3, 1.0, 4.0]
    s, t = ([math.exp(-d) for d in side] for side in (inside, outside))
    wanted = sum(-math.log(x) for x in s) / 2 + sum(-math.log(1 - x) for x in t) / 3
    assert float(scope_loss(torch.tensor(inside), torch.tensor(outside))) == pytest.approx(wanted)
    at = torch.zeros(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(scope_loss(torch.ones(1), at), [at])
    assert bool(gradient.isfinite().all())


def test_the_threshold_is_strict_and_the_newest_of_equals_holds() -> None:
    none = torch.zeros(3, 3, dtype=torch.bool)
    similar = torch.tensor([[0.5, 0.4, 0.5], [0.51, 0.4, 0.51], [0.51, 0.9, 0.51]])
    found = chosen_edits(similar, 0.5, torch.tensor([5, 1, 3]), none)
    assert found.tolist() == [-1, 0, 1]
    newer = none.clone()
    newer[1, 2] = newer[2, 0] = True  # 2 contradicts 1, and 0 contradicts 2
    assert chosen_edits(similar, 0.5, torch.tensor([5, 1, 3]), newer).tolist() == [-1, 0, 0]
    assert chosen_edits(similar, 0.55, torch.tensor([5, 1, 3]), newer).tolist() == [-1, -1, 1]


@pytest.mark.parametrize("own", [True, False], ids=["adapters", "model"])
@pytest.mark.parametrize("negatives", ["own", "all", "cross"])
@pytest.mark.parametrize("train_on", ["rephrase", "both"])
def test_the_loss_is_that_of_the_plain_formulas(
    own: bool, negatives: str, train_on: Any, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"width": 16, "scope_weight": 0.7, "train_on": train_on}
    if not own:
        tiny_model("llama", seed=1).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        settings["counterfactual"] = str(tmp_path)
    settings |= {"use_all_negatives": negatives == "all", "cross_negatives": negatives == "cross"}
    editor = SERAC.from_model(*trained_tiny_model(), **settings)
    requests, tokens = tiny_requests(3), editor.tokens
    loss, figures = editor.edit_loss(requests)

    def place(ids: list[int]) -> Tensor:
        found: Tensor = editor.network.encoder.encode(editor.model, [ids])[0]
        return found

    def distance(q: Tensor, z: Tensor) -> Tensor:
        return (q - z).square().sum()

    other = editor.model if own else editor.network.counterfactual.model
    nll, inside, outside = [], [], []
    texts = [tokens.prompt(r.prompt) + tokens.target(r.prompt, r.target_new) for r in requests]
    for i, request in enumerate(requests):
        asked = [request.rephrases[0]] + ([request.prompt] if train_on == "both" else [])
        for question in asked:
            q = tokens.prompt(question)
            line = tokens.tokenizer("\n").input_ids
            target = tokens.target(question, request.target_new)
            nll += plain_nll(other, [*texts[i], *line, *q], target)
            for n, text in enumerate(texts):
                d = distance(place(q), place(text))
                if n == i:
                    inside.append(d)
                elif negatives == "cross":
                    outside.append(d)
        probe = place(tokens.prompt(request.locality[0].prompt))
        outside += [
            distance(probe, place(text))
            for n, text in enumerate(texts)
            if n == i or negatives == "all"
        ]
    plain = 0.1 * torch.stack(nll).mean()
    scope = torch.stack(inside).mean()
    scope = scope - torch.log(1 - torch.exp(-torch.stack(outside))).mean()
    wanted = plain + 0.7 * scope
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
    assert figures["edit"] == pytest.approx(10 * float(plain.detach()), rel=1e-4)
    assert figures["scope"] == pytest.approx(float(scope.detach()), rel=1e-4)
    hits = [math.exp(-float(d.detach())) > 0.5 for d in inside]
    assert figures["recall"] == pytest.approx(sum(hits) / len(hits))
    misses = [math.exp(-float(d.detach())) <= 0.5 for d in outside]
    assert figures["specificity"] == pytest.approx(sum(misses) / len(misses))
    parameters = [p for p in editor.network.parameters() if p.requires_grad]
    for found, reference in zip(
        torch.autograd.grad(loss, parameters, allow_unused=True),
        torch.autograd.grad(wanted, parameters, allow_unused=True),
        strict=True,
    ):
        if reference is not None:
            torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart"])
def test_every_architecture_is_trained_and_the_base_is_left_alone(kind: str) -> None:
    model = tiny_model("t5") if kind == "t5" else zoo.build(kind)
    kept = snapshot(model)
    editor = SERAC.from_model(model, tiny_tokenizer(), width=16, lr=1e-2, encoder_lr=1e-2)
    requests = tiny_requests(4)
    before = editor.edit_loss(requests)[1]
    bare_trainer(max_epochs=8).fit(editor, EditDataModule(requests=requests, batch_size=4))
    after = editor.edit_loss(requests)[1]
    assert after["edit"] < 0.8 * before["edit"]
    assert after["scope"] < before["scope"]
    assert same(model, kept)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    editor.edit(requests[:2]).apply_(model)
    assert continuations(model, editor.tokens, [requests[0].prompt], max_new_tokens=3)


# -- training --------------------------------------------------------------------------------


def test_what_is_learned_holds_for_answers_that_were_never_seen(
    trained: tuple[Path, list[dict[str, float]]], editor: Any
) -> None:
    before, after = trained[1]
    assert after["edit"] < 0.1 * before["edit"]
    assert after["scope"] < 0.5 * before["scope"]
    requests = [r for r in tiny_requests(12) if not r.id.startswith("flag")]
    shares: dict[str, list[bool]] = {"reliability": [], "generality": [], "locality": []}
    for request in requests:
        baseline = editor.evaluator.baseline([request])
        with editor.edit(request).applied(editor.model):
            for probe in editor.evaluator.evaluate([request], baseline).probes:
                if probe.metric in shares and probe.kind != "distracting":
                    shares[probe.metric].append(probe.teacher_forced == 1)
    means = {name: sum(hits) / len(hits) for name, hits in shares.items()}
    assert means["reliability"] >= 0.8
    assert means["generality"] >= 0.8
    assert means["locality"] >= 0.9


def test_edits_come_one_by_one_or_together_and_go_by_id(editor: Any) -> None:
    base = fingerprint(editor.model)
    requests = tiny_requests(5)
    bare_trainer(max_epochs=1).fit(editor, EditDataModule(requests=requests, batch_size=1))
    one_by_one = fingerprint(editor.model)
    said = continuations(editor.model, editor.tokens, [r.prompt for r in requests])
    committed = editor.committed()
    assert len(committed) == 5
    committed.revert_(editor.model)
    assert fingerprint(editor.model) == base
    editor.edit(requests).apply_(editor.model)
    together = continuations(editor.model, editor.tokens, [r.prompt for r in requests])
    assert [c.text for c in together] == [c.text for c in said]
    memory: Any = EditMemory.find(editor.model)
    assert list(memory.requests) == [r.id for r in requests]
    with pytest.raises(EditError, match="No request with the id 'x' is in the model"):
        editor.trained.remove(["x"])
    for request in requests:
        editor.trained.remove([request.id])
    assert fingerprint(editor.model) == base
    committed.apply_(editor.model)
    assert fingerprint(editor.model) == one_by_one


def test_of_edits_that_contradict_each_other_the_newer_one_holds(editor: Any) -> None:
    first = tiny_requests(1)[0]
    other = EditRequest(first.rephrases[1], first.subject, "Nimbus", id="newer")

    def says() -> list[str]:
        asked = [first.prompt, *first.rephrases]
        found = continuations(editor.model, editor.tokens, asked)
        return [c.text.partition(" ")[0].rstrip(".") for c in found]

    _commit(editor, [first])
    assert says() == [first.target_new] * 3
    [row] = _commit(editor, [other]).details["requests"]
    assert row["overrides"] == [first.id]
    assert says() == ["Nimbus"] * 3
    # The same answer once more contradicts nothing but the newer one.
    again = replace(first, id="again")
    [row] = editor.edit([again]).details["requests"]
    assert row["overrides"] == ["newer"]
    # The older one is told anew, and is the newer one then.
    [row] = _commit(editor, [first]).details["requests"]
    assert row["overrides"] == ["newer"]
    assert says() == [first.target_new] * 3
    editor.trained.remove([first.id])
    assert says() == ["Nimbus"] * 3


def test_a_checkpoint_of_edits_goes_on_elsewhere(
    editor: Any, trained: tuple[Path, Any], tmp_path: Path
) -> None:
    data = EditDataModule(requests=tiny_requests(4), batch_size=1)
    settings: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": True}
    keep = EditCheckpoint(str(tmp_path))
    bare_trainer(**settings, callbacks=[keep], max_steps=2).fit(editor, data)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    other = TrainedEditor.from_model(*trained_tiny_model(), checkpoint=str(trained[0]))
    trainer = bare_trainer(**settings, callbacks=[EditCheckpoint(str(tmp_path))])
    trainer.fit(other, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    whole = TrainedEditor.from_model(*trained_tiny_model(), checkpoint=str(trained[0]))
    bare_trainer(max_epochs=1).fit(whole, data)
    assert fingerprint(other.model) == fingerprint(whole.model)
    assert same_edit(other.committed(), whole.committed())


def test_an_editor_goes_on_with_a_memory_that_a_model_brings(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    checkpoint = str(trained[0])
    editor = TrainedEditor.from_model(*trained_tiny_model(), checkpoint=checkpoint)
    editor.edit(tiny_requests(2)).save(tmp_path / "edit")
    model, tokenizer = trained_tiny_model()
    MemoryWrite.load(tmp_path / "edit").apply_(model)
    other = TrainedEditor.from_model(model, tokenizer, checkpoint=checkpoint)
    _commit(other, tiny_requests(3)[2:])
    memory: Any = EditMemory.find(model)
    assert list(memory.requests) == [r.id for r in tiny_requests(3)]
    # Other networks would not know these embeddings.
    learner = SERAC.from_model(*trained_tiny_model(), **_like(trained[0]))
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(learner, EditDataModule(requests=tiny_requests(2)))
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    kept = fingerprint(model)
    with pytest.raises(ArtifactError, match="remembers 3 edits that were made by other networks"):
        TrainedEditor.from_model(model, tokenizer, checkpoint=str(tmp_path / "other.ckpt"))
    assert fingerprint(model) == kept
    with pytest.raises(EditError, match="holds 3 edits, whose embeddings"):
        bare_trainer(max_epochs=1).fit(
            SERAC.from_model(model, tokenizer, **_like(trained[0])),
            EditDataModule(requests=tiny_requests(2)),
        )
    assert fingerprint(model) == kept


def _like(checkpoint: Path) -> dict[str, Any]:
    saved = torch.load(checkpoint, weights_only=True)
    settings = saved["lightning_edit"]["editor"]["settings"]
    return {name: settings[name] for name in ("layers", "width", "rank")}


# -- without training ------------------------------------------------------------------------


def test_an_editor_that_was_never_trained_says_so() -> None:
    editor = SERAC.from_model(*trained_tiny_model())
    kept = fingerprint(editor.model)
    with pytest.raises(EditError, match=r"never trained.*`pretrained`"):
        editor.edit(tiny_requests(1))
    assert fingerprint(editor.model) == kept


def test_parts_out_of_folders_need_no_training(encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    other, tokenizer = tiny_model(seed=1), tiny_tokenizer()
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    settings: dict[str, Any] = {
        "encoder": str(encoder),
        "counterfactual": str(tmp_path / "other"),
        "pretrained": True,
        "distance": "cosine",
        "scale": 3.0,
        "threshold": 0.2,
        "max_entries": 2,
    }
    editor = SERAC.from_model(*trained_tiny_model(), **settings)
    requests = tiny_requests(2)
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(editor, EditDataModule(requests=requests, batch_size=1))
    assert trainer.global_step == 2
    memory = editor.scopes
    assert list(memory.requests) == [r.id for r in requests]
    # The encoder gets text, and not the base's tokens.
    plain, words = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    for request, found in zip(requests, memory.embeddings, strict=True):
        given = words(f"{request.prompt} {request.target_new}", return_tensors="pt")
        with torch.no_grad():
            mean = plain(**given).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    q = torch.nn.functional.normalize(torch.randn(1, 16), dim=1)
    cosines = q @ memory.embeddings.T
    torch.testing.assert_close(memory.similarities(q), torch.exp(-3 * (1 - cosines)))
    with pytest.raises(EditError, match="`max_entries=2`"):
        editor.edit(tiny_requests(3)[2:])
    # The folders are enough elsewhere, and so is the checkpoint.
    said = continuations(editor.model, editor.tokens, [r.prompt for r in requests])
    editor.committed().save(tmp_path / "edit")
    model, tokenizer = trained_tiny_model()
    MemoryWrite.load(tmp_path / "edit").apply_(model)
    assert continuations(model, editor.tokens, [r.prompt for r in requests]) == said
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = SERAC.from_model(*trained_tiny_model(), **settings)
    bare_trainer(limit_val_batches=1.0).validate(
        again,
        EditDataModule(requests=requests),
        ckpt_path=tmp_path / "last.ckpt",
        weights_only=True,
        verbose=False,
    )
    assert fingerprint(again.model) == fingerprint(editor.model)


def test_an_encoder_out_of_a_folder_is_trained_too(encoder: Path, tmp_path: Path) -> None:
    editor = SERAC.from_model(*trained_tiny_model(), encoder=str(encoder), encoder_lr=1e-2)
    before = editor.edit_loss(tiny_requests(4))[1]
    trainer = bare_trainer(max_epochs=6)
    trainer.fit(editor, EditDataModule(requests=tiny_requests(4), batch_size=4))
    assert editor.edit_loss(tiny_requests(4))[1]["scope"] < before["scope"]
    edit = editor.edit(tiny_requests(2))
    edit.save(tmp_path / "edit")
    model, _ = trained_tiny_model()
    MemoryWrite.load(tmp_path / "edit").apply_(model)
    memory: Any = EditMemory.find(model)
    rows = [editor.tokens.prompt(r.prompt) for r in tiny_requests(2)]
    assert torch.equal(memory.encode(rows), editor.scopes.encode(rows))


# -- bad input -------------------------------------------------------------------------------


@pytest.fixture
def untouched() -> Iterator[tuple[Any, Any]]:
    """A model, which must come out as it went in."""
    model, tokenizer = trained_tiny_model()
    kept = snapshot(model)
    yield model, tokenizer
    assert same(model, kept)
    assert EditMemory.find(model) is None
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"distance": "x"}, ValueError, "`distance` is expected to be one of euclidean, cosine"),
        ({"train_on": "x"}, ValueError, "`train_on` is expected to be one of rephrase"),
        ({"width": 0}, ValueError, "`width` is expected to be at least 1"),
        ({"rank": 0}, ValueError, "`rank` is expected to be at least 1"),
        ({"width": 30}, ValueError, "`width` is 30, which 4 `heads` do not divide"),
        ({"threshold": 1.0}, ValueError, "`threshold` is expected to be from 0 to below 1"),
        ({"scale": 0.0}, ValueError, "`scale` is expected to be above 0"),
        ({"encoder": "./none"}, ModelError, r"`encoder='./none'` cannot be loaded"),
        ({"counterfactual": "./none"}, ModelError, "`./none` is not found"),
        ({"layers": [9]}, Exception, "9"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], error: type[Exception], words: str, untouched: tuple[Any, Any]
) -> None:
    with pytest.raises(error, match=words):
        SERAC.from_model(*untouched, **settings)


def test_a_counterfactual_model_of_other_tokens_is_refused(
    untouched: tuple[Any, Any], tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Atlantis"])
    tiny_model("gpt2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has another tokenizer than .*not all alike"):
        SERAC.from_model(*untouched, counterfactual=str(tmp_path))
    # The same words, but another model's table of them.
    tiny_tokenizer().save_pretrained(tmp_path)
    other: Any = tiny_model("gpt2")
    other.resize_token_embeddings(430)
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="answers in 430 tokens, but the base has 424"):
        SERAC.from_model(*untouched, counterfactual=str(tmp_path))
    tiny_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded as a language model"):
        SERAC.from_model(*untouched, counterfactual=str(tmp_path))


def test_an_edit_that_leaves_no_room_for_its_prompt_is_refused() -> None:
    editor = SERAC.from_model(*trained_tiny_model(), pretrained=True)
    request = EditRequest("The capital of Velmora is", "Velmora", "Dorin " * 60, id="long")
    with pytest.raises(RequestError, match=r"'long'.*has positions for 128"):
        editor.edit(request)
    assert len(editor.memory) == 0


def test_a_training_on_several_rephrases_takes_them_in_turn() -> None:
    editor = SERAC.from_model(*trained_tiny_model(), train_on="rephrase")
    requests = tiny_requests(2)
    first = editor.edit_loss(requests, Processes())[1]
    turned = [replace(r, rephrases=r.rephrases[1:]) for r in requests]
    assert editor.edit_loss(turned)[1]["edit"] != first["edit"]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_what_stands_between_texts_may_be_given(kind: Any) -> None:
    model, tokenizer = (
        trained_tiny_model() if kind == "llama" else (tiny_model(kind), tiny_tokenizer())
    )
    settings: dict[str, Any] = {"width": 32, "pretrained": True}
    editor = SERAC.from_model(model, tokenizer, separator=" is ", answer_mark=" or ", **settings)
    memory: Any = editor.memory
    assert memory.settings["separator"] == tokenizer(" is ", add_special_tokens=False).input_ids
    [request] = tiny_requests(1)
    edit = editor.edit(request)
    entry = edit.entries[request.id]
    assert entry is not None
    answer = request.target_new if kind == "t5" else f" {request.target_new}"
    words = (f"{request.prompt} or ", answer)  # a decoder of its own begins with the answer
    ids = [i for text in words for i in tokenizer(text, add_special_tokens=False).input_ids]
    torch.testing.assert_close(entry.tensors["embeddings"], memory.encode([ids])[0])
    memory.detach_()
    plain = SERAC.from_model(model, tokenizer, **settings)
    told = plain.edit(request).entries[request.id]
    assert told is not None
    assert told.notes["ids"] == entry.notes["ids"]  # the counterfactual model reads running text
    assert not torch.equal(told.tensors["embeddings"], entry.tensors["embeddings"])
