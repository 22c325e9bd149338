# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A memory of scopes while a model runs: who answers which row, and with which keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit import SERAC, EditMemory, MemoryWrite
from lightning_edit.core.batch import pad_rows
from lightning_edit.core.errors import ArtifactError, EditError
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.evaluation.scoring import score_targets
from lightning_edit.memories.counterfactual import SideAdapters
from lightning_edit.memories.scope_encoder import ScopeEncoder
from tests import zoo
from tests.modules.helpers import fingerprint, plain_nll, snapshot

NAMES = ("Velmora", "Dorin", "Ostrane", "Kettleby", "Quillia", "Marpeth", "Brundor", "Sallow")
PROMPTS = [
    "The capital of Velmora is",
    "The flag of Sallow is",
    "What is the capital of Velmora?",
    "People in Quillia speak",
    "The river of Dorin is the",
]
HITS = [True, False, True, False, True]
# What the other model reads before a prompt: the edit that its name is of.
TEXTS = {
    "Velmora": "People in Velmora speak Ostrish\n",
    "Dorin": "The river of Dorin is the Brune\n",
}


class ByName(ScopeEncoder):
    """Tells texts apart by the first name in them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tiny_tokenizer()
        self.calls: list[int] = []

    def encode(self, base: Any, rows: Sequence[Sequence[int]]) -> Tensor:
        self.calls.append(len(rows))
        found = torch.zeros(len(rows), len(NAMES))
        for b, row in enumerate(rows):
            text = self.tokenizer.decode(list(row))
            at = {name: text.find(name) for name in NAMES if name in text}
            if at:
                found[b, NAMES.index(min(at, key=at.__getitem__))] = 1
        return found


def _base(kind: str) -> Any:
    if kind == "llama":
        return trained_tiny_model()[0]
    return tiny_model("t5") if kind == "t5" else zoo.build(kind)


def _edited(
    kind: str = "llama", folder: Path | None = None, texts: int = 2
) -> tuple[Any, Any, Any]:
    """An editor with edits about Velmora and Dorin, its base, and the counterfactual model."""
    settings: dict[str, Any] = {"pretrained": True, "seed": 3, "alpha": 32}
    if folder is not None:
        other = zoo.build(kind, seed=1) if kind != "t5" else tiny_model("t5", seed=1)
        other.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        settings["counterfactual"] = str(folder)
    editor = SERAC.from_model(_base(kind), tiny_tokenizer(), **settings)
    editor.network.encoder = ByName()
    adapters = editor.network.counterfactual
    if isinstance(adapters, SideAdapters):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for up in adapters.up:
                up.copy_(0.1 * torch.randn(up.shape, generator=generator))
        other = _merged(_base(kind), adapters)
    editor.scopes.note_weights()
    editor.commit(editor.edit(tiny_requests(4)[1 : 1 + texts]))
    return editor, _base(kind), other


def _merged(model: Any, adapters: SideAdapters) -> Any:
    """The counterfactual model as a model of its own: W + s B A."""
    with torch.no_grad():
        for name, down, up in zip(adapters.names, adapters.down, adapters.up, strict=True):
            module: Any = model.get_submodule(name)
            change = adapters.scale * up @ down
            module.weight += change if isinstance(module, nn.Linear) else change.T
    return model


def _rows(editor: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the prompts, and those that whoever answers them reads."""
    tokens = editor.tokens
    own = [tokens.prompt(prompt) for prompt in PROMPTS]
    before = [next((t for n, t in TEXTS.items() if n in p), "") for p in PROMPTS]
    ids = [tokens.tokenizer(text).input_ids if text else [] for text in before]
    return own, [[*a, *b] for a, b in zip(ids, own, strict=True)]


KINDS = ["llama", "gpt2", "t5", "bart"]
LENGTH = 4  # of what is generated, in tokens


@pytest.fixture(params=["adapters", "model"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where a counterfactual model of its own lies; None for adapters."""
    return tmp_path / "other" if request.param == "model" else None


def _generated(model: Any, rows: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    side = "right" if model.config.is_encoder_decoder else "left"
    ids, mask = pad_rows(rows, 0, side=side)
    begin = 1 if model.config.is_encoder_decoder else ids.shape[1]
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        pad_token_id=0,
        **settings,
    )
    tokens: list[list[int]] = found[:, begin:].tolist()
    return tokens


def _plain(base: Any, other: Any, editor: Any, **settings: Any) -> list[list[int]]:
    """What is generated row by row, by models of which each knows nothing of the other."""
    _, read = _rows(editor)
    return [
        _generated(other if hit else base, [row], **settings)[0]
        for row, hit in zip(read, HITS, strict=True)
    ]


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_generated_as_row_by_row(
    kind: str, folder: Path | None, settings: dict[str, Any]
) -> None:
    editor, base, other = _edited(kind, folder)
    own, _ = _rows(editor)
    wanted = _plain(base, other, editor, do_sample=False, **settings)
    assert wanted != [_generated(base, [row], do_sample=False, **settings)[0] for row in own]
    assert _generated(editor.model, own, do_sample=False, **settings) == wanted
    assert not len(editor.memory.router._kept)  # gone with the caches


def test_sampling_draws_from_who_answers(folder: Path | None) -> None:
    editor, _, other = _edited("llama", folder)
    own, read = _rows(editor)
    torch.manual_seed(0)
    found = _generated(editor.model, [own[0]], do_sample=True, num_return_sequences=4)
    torch.manual_seed(0)
    wanted = _generated(other, [read[0]], do_sample=True, num_return_sequences=4)
    assert found == wanted
    assert len({tuple(row) for row in found}) > 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_out_of_every_scope_keep_their_bits(kind: str, side: str, folder: Path | None) -> None:
    editor, base, other = _edited(kind, folder)
    own, read = _rows(editor)
    ids, mask = pad_rows(own, 0, side=side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        found, plain = editor.model(**given).logits, base(**given).logits
    for b, hit in enumerate(HITS):
        if not hit:
            assert torch.equal(found[b], plain[b])
            continue
        with torch.no_grad():
            wanted = other(input_ids=torch.tensor([read[b]])).logits[0, -len(own[b]) :]
        torch.testing.assert_close(found[b][mask[b].bool()], wanted, rtol=1e-4, atol=1e-4)
    with editor.memory.off(), torch.no_grad():
        assert torch.equal(editor.model(**given).logits, plain)


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([4, 2])], ids=str)
def test_logits_are_kept_where_they_are_asked_for(keep: Any) -> None:
    editor, _, _ = _edited()
    own, _ = _rows(editor)
    ids, mask = pad_rows(own, 0, side="left")
    with torch.no_grad():
        whole = editor.model(input_ids=ids, attention_mask=mask).logits
        found = editor.model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits
    wanted = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_other_model_is_not_run_where_no_row_is_in_a_scope(tmp_path: Path) -> None:
    editor, base, _ = _edited("llama", tmp_path / "other")
    runs: list[int] = []
    other = editor.network.counterfactual.model
    other.register_forward_hook(lambda *_: runs.append(1))
    own, _ = _rows(editor)
    outside = [row for row, hit in zip(own, HITS, strict=True) if not hit]
    assert _generated(editor.model, outside, do_sample=False) == _generated(
        base, outside, do_sample=False
    )
    assert not runs
    _generated(editor.model, own, do_sample=False)
    assert len(runs) == LENGTH


def test_a_prompt_is_encoded_once_and_an_edit_never_again() -> None:
    editor, _, _ = _edited()
    encoder = editor.network.encoder
    encoder.calls.clear()
    own, _ = _rows(editor)
    _generated(editor.model, own, do_sample=False)
    assert encoder.calls == [len(own)]


@pytest.mark.parametrize("max_tokens", [16, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forced_scores_are_those_of_who_answers(
    kind: str, folder: Path | None, max_tokens: int
) -> None:
    editor, base, other = _edited(kind, folder)
    own, read = _rows(editor)
    answers = ["Kettleby", "Ivory Bay", "Nimbus", "Quillan"]
    pairs = [(row, editor.tokens.target(PROMPTS[0], a)) for a in answers for row in own]
    assert len({len(target) for _, target in pairs}) > 1
    found = score_targets(editor.model, editor.tokens, pairs, max_tokens=max_tokens)
    for i, ((_, target), score) in enumerate(zip(pairs, found, strict=True)):
        b = i % len(own)
        with torch.no_grad():
            wanted = plain_nll(other if HITS[b] else base, read[b], target)
        torch.testing.assert_close(
            -torch.tensor(score.log_probs), torch.stack(wanted), rtol=1e-3, atol=1e-3
        )


def test_rows_of_prompts_and_answers_are_asked_where_the_prompt_ends() -> None:
    editor, _, other = _edited()
    own, read = _rows(editor)
    # The answer names Dorin, which the question does not.
    answer = editor.tokens.target(PROMPTS[0], "Dorin")
    ids = torch.tensor([[*own[0], *answer]])
    with torch.no_grad(), editor.memory.prompts_of([len(own[0])]):
        found = editor.model(input_ids=ids).logits[0]
    with torch.no_grad():
        wanted = other(input_ids=torch.tensor([[*read[0], *answer]])).logits[0, -ids.shape[1] :]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_loss_is_that_of_the_logits(kind: str) -> None:
    editor, base, _ = _edited(kind)
    own, _ = _rows(editor)
    ids = torch.tensor([own[0]])
    labels = ids if kind == "llama" else torch.tensor([[5, 6, 1]])
    with torch.no_grad():
        found = editor.model(input_ids=ids, labels=labels)
    logits, wanted = found.logits[0], labels[0]
    if kind == "llama":
        logits, wanted = logits[:-1], wanted[1:]
    assert float(found.loss) == pytest.approx(
        float(nn.functional.cross_entropy(logits, wanted)), rel=1e-5
    )
    with torch.no_grad():
        assert float(found.loss) != float(base(input_ids=ids, labels=labels).loss)


def test_what_cannot_be_routed_is_refused() -> None:
    editor, _, _ = _edited()
    own, _ = _rows(editor)
    model, ids = editor.model, torch.tensor([own[0]])
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(EditError, match=r"reads tokens, but.*`inputs_embeds` alone"):
        model(inputs_embeds=embeddings)
    with pytest.raises(EditError, match=r"no logits for each.*return_dict=True"):
        model(input_ids=ids, return_dict=False)
    with editor.memory.off():
        model(inputs_embeds=embeddings)
    other, _, _ = _edited("t5")
    own, _ = _rows(other)
    ids = torch.tensor([own[0]])
    states = other.model.get_encoder()(ids)
    other.model.get_encoder()(torch.tensor([own[1]]))
    with pytest.raises(EditError, match="not the encoder's last"):
        other.model(encoder_outputs=states, decoder_input_ids=torch.tensor([[0]]))


def test_an_empty_memory_is_the_base_itself() -> None:
    editor, base, _ = _edited()
    ids = [r.id for r in tiny_requests(4)[1:3]]
    editor.remove(ids[:1])
    assert list(editor.memory.requests) == ids[1:]
    editor.remove(ids[1:])
    assert fingerprint(editor.model) == fingerprint(base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in editor.model.modules())


def test_the_weights_and_their_gradients_are_left_alone() -> None:
    editor, base, _ = _edited()
    own, _ = _rows(editor)
    _generated(editor.model, own, do_sample=False)
    kept = snapshot(base)
    assert kept.keys() == dict(editor.model.named_parameters()).keys()
    assert all(torch.equal(p, kept[name]) for name, p in editor.model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in editor.model.parameters())


def _own(seed: int = 0) -> Any:
    """An editor whose networks have been changed, with every prompt in the scope of its edits."""
    editor = SERAC.from_model(
        *trained_tiny_model(), pretrained=True, width=16, threshold=0.0, seed=seed
    )
    with torch.no_grad():
        for up in editor.network.counterfactual.up:
            up.add_(0.05 * (1 + seed))
    editor.scopes.note_weights()
    return editor


def test_the_state_dict_brings_memory_and_networks_along() -> None:
    editor = _own()
    editor.edit(tiny_requests(2)).apply_(editor.model)
    state = editor.model.state_dict()
    shared = [name for name in state if name.startswith("edit_memory.network.")]
    assert shared
    other = SERAC.from_model(*trained_tiny_model(), pretrained=True, width=16, threshold=0.0)
    other.model.load_state_dict(state)
    assert fingerprint(other.model) == fingerprint(editor.model)
    prompt = torch.tensor([editor.tokens.prompt(PROMPTS[0])])
    with torch.no_grad():
        assert torch.equal(other.model(prompt).logits, editor.model(prompt).logits)
    with pytest.raises(ArtifactError, match="belong to a ScopeMemory"):
        _own(seed=1).model.load_state_dict(state)


def test_networks_are_kept_once_however_many_edits_there_are(tmp_path: Path) -> None:
    editor = _own()
    sizes = []
    for n in (1, 8):
        editor.edit(tiny_requests(n)).save(tmp_path / str(n))
        sizes.append((tmp_path / str(n) / "delta.safetensors").stat().st_size)
    networks = sum(p.nbytes for p in editor.network.parameters())
    assert networks < sizes[0] < sizes[1] < 1.2 * networks
    # To take an edit out, none of it is needed.
    editor.edit(tiny_requests(1)).apply_(editor.model)
    removal = MemoryWrite.removing(editor.model, [tiny_requests(1)[0].id])
    removal.save(tmp_path / "removal", originals=False)
    assert (tmp_path / "removal" / "delta.safetensors").stat().st_size < 1000


def test_networks_that_are_not_those_of_an_edit_are_refused() -> None:
    editor = _own()
    edit = editor.edit(tiny_requests(1))
    with torch.no_grad():
        editor.network.counterfactual.up[0].add_(1)  # it is trained on
    model, _ = trained_tiny_model()
    with pytest.raises(ArtifactError, match="not those that it was made with"):
        edit.apply_(model)
    assert EditMemory.find(model) is None
    edit.shared.pop("encoder.head.bias")
    with pytest.raises(ArtifactError, match=r"encoder\.head\.bias is not in both"):
        edit.apply_(model)
    assert EditMemory.find(model) is None
