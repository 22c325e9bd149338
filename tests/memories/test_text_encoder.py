# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Text encoders out of folders against what sentence-transformers makes of the same folders."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from lightning_edit import IKE, SCR, SERAC, EditDataModule, EditMemory, MemoryWrite, TrainedEditor
from lightning_edit.core.errors import ArtifactError, MissingDependencyError
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.memories.encoder import encode_by_folder
from lightning_edit.memories.text_encoder import PLAIN_POOLING, load_encoder
from tests.memories.sentence_models import save_encoder, save_sentence_model
from tests.modules.helpers import bare_trainer, fingerprint
from tests.sealed import rewrite

TEXTS = ["The capital of Velmora is", "x", "Which language do they speak in Velmora, and why?"]
MISMATCH = r"made with embeddings by mean\+normalize, but `encoder=.*` asks for cls"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"asked for {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def cls_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_sentence_model(tmp_path_factory.mktemp("encoders") / "cls", "cls"))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _forget_pooling(value: Any) -> Any:
    """A description as it was before poolings were noted."""
    if isinstance(value, dict):
        return {k: _forget_pooling(v) for k, v in value.items() if k != "pooling"}
    return value


def test_vectors_are_those_of_sentence_transformers(subtests: Any, tmp_path: Path) -> None:
    asked = {"prompts": {"q": "query: "}, "default_prompt_name": "q", "truncate_dim": 3}
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("mean", {}, "mean"),
        ("mean", {"normalize": True}, PLAIN_POOLING),
        ("cls", {}, "cls"),
        ("cls", {"normalize": True}, "cls+normalize"),
        ("max", {"dense": True, "normalize": True}, "max+dense+normalize"),
        ("lasttoken", asked, "lasttoken+prompt 'query: '+first 3"),
    )
    for pooling, settings, words in cases:
        with subtests.test(words):
            folder = str(save_sentence_model(tmp_path / words[:20], pooling, **settings))
            theirs = SentenceTransformer(folder, device="cpu", local_files_only=True)
            wanted = theirs.encode(TEXTS, convert_to_tensor=True).clone()
            encoder = load_encoder(folder)
            assert encoder.pooling == words
            assert_near(encoder(TEXTS).detach(), wanted)
            found = encode_by_folder(folder, words, TEXTS)
            assert_near(found, normalize(wanted, dim=1))
            with pytest.raises(ArtifactError, match="embeddings by x, but"):
                encode_by_folder(folder, "x", TEXTS)


def test_a_plain_folder_is_used_with_the_mean_and_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = save_sentence_model(tmp_path / "model", "mean", normalize=True)
    wanted = load_encoder(str(whole))(TEXTS)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    encoder = load_encoder(str(save_encoder(tmp_path / "plain")))
    assert encoder.pooling == PLAIN_POOLING
    assert_near(encoder(TEXTS), wanted)
    for cls in (SCR, SERAC):
        with pytest.raises(MissingDependencyError, match=r"lightning-edit\[encoders\]"):
            cls.from_model(*trained_tiny_model(), encoder=str(whole))


def test_gradients_reach_all_weights_of_the_encoder(tmp_path: Path) -> None:
    encoder = load_encoder(str(save_sentence_model(tmp_path / "model", "max", dense=True)))
    encoder(TEXTS).square().sum().backward()  # type: ignore[no-untyped-call]
    idle = [n for n, p in encoder.transformer.named_parameters() if p.grad is None]
    assert all(name.startswith("pooler.") for name in idle)
    grads = [p.grad for p in encoder.head.parameters()]
    assert grads
    assert all(grad is not None and bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("cls", [SCR, IKE])
def test_facts_are_found_by_the_pooling_of_the_folder(
    cls: Any, cls_folder: str, tmp_path: Path
) -> None:
    settings = {"encoder": cls_folder, **({"count": 2} if cls is IKE else {})}
    editor = cls.from_model(*trained_tiny_model(), **settings)
    requests = tiny_requests(3)
    editor.edit(requests).apply_(editor.model)
    theirs = SentenceTransformer(cls_folder, device="cpu", local_files_only=True)
    wanted = theirs.encode([r.prompt for r in requests], convert_to_tensor=True).clone()
    found = editor.memory.get_buffer("embeddings")
    assert_near(found, normalize(wanted, dim=1))
    saved = editor.committed().save(tmp_path / "edit")
    other, _ = trained_tiny_model()
    edit = MemoryWrite.load(saved)
    edit.apply_(other)
    memory = EditMemory.find(other)
    assert memory is not None
    prompts = ["Which language has Velmora?", requests[2].prompt]
    asked = editor.memory.rewrite(prompts, editor.tokens)
    assert memory.rewrite(prompts, editor.tokens) == asked
    edit.revert_(other)
    # What was made with the mean, of this folder, is no use with another pooling.
    config = json.loads((saved / "delta_config.json").read_text())
    rewrite(saved, memory=_forget_pooling(config["memory"]))
    MemoryWrite.load(saved).apply_(other)
    memory = EditMemory.find(other)
    assert memory is not None
    with pytest.raises(ArtifactError, match=MISMATCH):
        memory.rewrite(prompts, editor.tokens)
    with pytest.raises(ArtifactError, match="belong to a PromptMemory"):
        MemoryWrite.load(saved).apply_(cls.from_model(*trained_tiny_model(), **settings).model)


def test_serac_trains_and_keeps_an_encoder_with_its_pooling(
    cls_folder: str, tmp_path: Path
) -> None:
    folder = str(shutil.copytree(cls_folder, tmp_path / "encoder"))
    settings: dict[str, Any] = {"encoder": folder, "encoder_lr": 1e-2}
    editor = SERAC.from_model(*trained_tiny_model(), **settings)
    requests = tiny_requests(4)
    before = editor.edit_loss(requests)[1]
    trainer = bare_trainer(max_epochs=6)
    trainer.fit(editor, EditDataModule(requests=requests, batch_size=4))
    assert editor.edit_loss(requests)[1]["scope"] < before["scope"]
    trainer.save_checkpoint(tmp_path / "serac.ckpt")
    editor.edit(requests[:2]).apply_(editor.model)
    saved = editor.committed().save(tmp_path / "edit")
    rows = [editor.tokens.prompt(r.prompt) for r in requests]
    wanted = editor.scopes.encode(rows)

    model, _ = trained_tiny_model()
    MemoryWrite.load(saved).apply_(model)
    memory: Any = EditMemory.find(model)
    assert torch.equal(memory.encode(rows), wanted)
    again: Any = TrainedEditor.from_model(
        *trained_tiny_model(), checkpoint=str(tmp_path / "serac.ckpt")
    )
    assert torch.equal(again.memory.encode(rows), wanted)

    # The same files, from a time when every folder was used with the mean.
    config = json.loads((saved / "delta_config.json").read_text())
    rewrite(saved, memory=_forget_pooling(config["memory"]))
    model, _ = trained_tiny_model()
    kept = fingerprint(model)
    with pytest.raises(ArtifactError, match=MISMATCH):
        MemoryWrite.load(saved).apply_(model)
    assert EditMemory.find(model) is None
    assert fingerprint(model) == kept
    checkpoint = torch.load(tmp_path / "serac.ckpt", weights_only=True)
    own = checkpoint["lightning_edit"]
    own["edit_state"] = _forget_pooling(own["edit_state"])
    torch.save(checkpoint, tmp_path / "old.ckpt")
    other = SERAC.from_model(*trained_tiny_model(), **settings)
    kept = fingerprint(other.network)
    with pytest.raises(ArtifactError, match=MISMATCH):
        other.load_editor(tmp_path / "old.ckpt")
    assert fingerprint(other.network) == kept

    # They go with what such a folder was used with, and it is told how.
    (tmp_path / "encoder" / "modules.json").unlink()
    MemoryWrite.load(saved).apply_(model)
    other = SERAC.from_model(*trained_tiny_model(), **settings)
    other.load_editor(tmp_path / "old.ckpt")
    with pytest.raises(ArtifactError, match=r"made with embeddings by cls, but .* asks for mean"):
        other.load_editor(tmp_path / "serac.ckpt")


def test_serac_of_the_plain_pooling_is_as_it_was(tmp_path: Path) -> None:
    """What was made of a plain folder serves where its pooling is told, and is the mean."""
    plain = save_encoder(tmp_path / "encoder")
    settings: dict[str, Any] = {"encoder": str(plain), "pretrained": True}
    editor = SERAC.from_model(*trained_tiny_model(), **settings)
    editor.edit(tiny_requests(2)).apply_(editor.model)
    edit = editor.committed()
    assert "pooling" not in edit.settings
    rows = [editor.tokens.prompt(r.prompt) for r in tiny_requests(2)]
    wanted = editor.scopes.encode(rows)
    whole = save_sentence_model(tmp_path / "whole", "mean", normalize=True)
    shutil.rmtree(plain)
    shutil.copytree(whole, plain)
    model, _ = trained_tiny_model()
    edit.apply_(model)
    memory: Any = EditMemory.find(model)
    assert_near(memory.encode(rows), wanted)
