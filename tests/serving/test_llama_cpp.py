# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The real server of llama.cpp gives the edited model's answers, and the base's again."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit import EditRequest, LoRA
from lightning_edit.artifacts import export, serve_patch
from lightning_edit.artifacts.outcomes import ServedPatches, ServerContents
from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ServerError
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.serving import Deployment, LlamaCpp
from tests import zoo
from tests.serving.servers import ask, llama_server

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp's server, xllamacpp, is not installed")

PROMPTS = [request.prompt for request in tiny_requests(3)]


def _edit(model: Any, base: Path, seed: int, size: float = 0.15) -> WeightDelta:
    """Changes every linear map, of ranks 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for i, (name, module) in enumerate(model.named_modules()):
        if name.endswith(("_proj", "c_attn", "c_fc")):
            factors = (size * torch.randn(n, 1 + i % 3, generator=generator)
                       for n in module.weight.shape)  # fmt: skip
            changes[f"{name}.weight"] = LowRank(*factors)
    return WeightDelta(changes, Provenance("ROME", base=BaseModelInfo(id=str(base))))


def _answer(model: Any, prompt: str, tokens: int = 6) -> str:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))


def _served(url: str, prompt: str, **fields: Any) -> str:
    body = {"prompt": prompt, "n_predict": 6, "temperature": 0, **fields}
    return str(ask(url, "/completion", body)["content"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The tiny trained model, and a folder with it as transformers and llama.cpp read it."""
    from tests.artifacts.gguf_models import save_model_as_gguf

    folder = tmp_path_factory.mktemp("world")
    model, tokenizer = trained_tiny_model()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    save_model_as_gguf(model, folder / "base.gguf")
    return model, folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_probabilities_are_those_of_the_edited_model(kind: str, tmp_path: Path) -> None:
    """All maps of all blocks, queries and keys among them, whose rows have another order there."""
    from tests.artifacts.gguf_models import logprobs, save_model_as_gguf

    model = trained_tiny_model()[0] if kind == "llama" else zoo.build("gpt2")
    model.save_pretrained(tmp_path / "base")
    delta = _edit(model, tmp_path / "base", seed=0, size=0.15 if kind == "llama" else 0.4)
    delta.save(tmp_path / "delta")
    export(str(tmp_path / "delta"), "gguf", str(tmp_path / "lora"))
    ids = tiny_tokenizer()(PROMPTS[0]).input_ids
    before = logprobs(model, ids)[-1]
    with delta.applied(model):
        wanted = logprobs(model, ids)[-1]
    assert (wanted - before).abs().max() > 1
    path = save_model_as_gguf(model, tmp_path / "base.gguf")
    with llama_server(path, [tmp_path / "lora" / "adapter.gguf"]) as url:
        for scale, logs in ((1.0, wanted), (0.0, before)):
            body = {"prompt": PROMPTS[0], "n_predict": 1, "temperature": 0, "n_probs": 5}
            found = ask(url, "/completion", {**body, "lora": [{"id": 0, "scale": scale}]})
            [first] = found["completion_probabilities"]
            for row in first["top_logprobs"]:
                # The cache of keys and values holds half precision.
                assert abs(row["logprob"] - float(logs[row["id"]])) < 0.02, row


def test_versions_on_a_running_server(
    world: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, folder = world
    edits = [_edit(model, folder / "base", seed) for seed in (1, 2)]
    for number, edit in enumerate(edits, 1):
        edit.save(tmp_path / f"delta{number}")
        made = serve_patch("make", [f"delta{number}"], "llama.cpp", name="facts")
        assert isinstance(made, ServedPatches)
        assert made.notes[0].startswith("llama-server --lora ")
    base = [_answer(model, prompt) for prompt in PROMPTS]
    edited = []
    for edit in edits:
        with edit.applied(model):
            edited.append([_answer(model, prompt) for prompt in PROMPTS])
    assert base != edited[0] != edited[1] != base
    files = [Path("served/facts").absolute() / f"v{n}" / f"facts-v{n}.gguf" for n in (1, 2)]

    with llama_server(folder / "base.gguf", files) as url:

        def do(action: Any, **more: Any) -> Any:
            return serve_patch(action, server="llama.cpp", url=url, name="facts", **more)

        def says() -> list[str]:
            return [_served(url, prompt) for prompt in PROMPTS]

        do("push", version=1)
        assert says() == edited[0]
        do("push", version=2)
        assert says() == edited[1]
        do("undo")
        assert says() == edited[0]
        do("push", version=2, share=0.25)
        assert says() == edited[0]  # of requests that name none
        contents = do("list")
        assert isinstance(contents, ServerContents)
        assert [(one.name, one.scale) for one in contents.names] == [
            ("facts-v1", 1),
            ("facts-v2", 0),
        ]
        deployment, server = Deployment("served/facts", "facts"), LlamaCpp(url)
        answers = {"facts-v1": edited[0], "facts-v2": edited[1], None: base}
        for name, wanted in answers.items():
            fields = server.fields(name)
            assert [_served(url, prompt, **fields) for prompt in PROMPTS] == wanted
        chosen = {deployment.choose(f"user {i}") for i in range(99)}
        assert chosen == {"facts-v1", "facts-v2"}
        do("pull")
        assert says() == base
        with pytest.raises(ServerError, match=r"was started without `other-v1` \(it has facts-v1"):
            serve_patch("push", ["delta1"], "llama.cpp", url, name="other")


def test_a_server_that_keeps_prompts_is_refused(world: tuple[Any, Path], tmp_path: Path) -> None:
    """It would answer with what it computed of a prompt before the change."""
    model, folder = world
    _edit(model, folder / "base", 1).save(tmp_path / "delta")
    export(str(tmp_path / "delta"), "gguf", str(tmp_path / "lora"))
    adapter = tmp_path / "lora" / "adapter.gguf"
    with (
        llama_server(folder / "base.gguf", [adapter], cache_prompt=True) as url,
        pytest.raises(ServerError, match="Start it with `--no-cache-prompt`"),
    ):
        LlamaCpp(url).push(tmp_path / "lora", "adapter")


def test_no_request_is_lost_while_versions_change(world: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = world
    edit = _edit(model, folder / "base", 1)
    deployment = Deployment(tmp_path / "served", "facts")
    edit.save(tmp_path / "delta")

    def write(place: Path, name: str) -> None:
        export(str(tmp_path / "delta"), "gguf", str(place))
        (place / "adapter.gguf").rename(place / f"{name}.gguf")

    version = deployment.add(write)
    prompt = PROMPTS[0]
    with edit.applied(model):
        possible = {_answer(model, prompt)}
    possible.add(_answer(model, prompt))
    assert len(possible) == 2
    answers: list[str] = []
    stop = threading.Event()
    with llama_server(folder / "base.gguf", [tmp_path / "served/v1/facts-v1.gguf"]) as url:
        server = LlamaCpp(url)

        def user() -> None:
            while not stop.is_set():
                answers.append(_served(url, prompt))

        users = [threading.Thread(target=user) for _ in range(4)]
        for one in users:
            one.start()
        for _ in range(5):
            deployment.push(server)
            time.sleep(0.02)
            deployment.undo(server)
            time.sleep(0.02)
        stop.set()
        for one in users:
            one.join()
    assert len(answers) >= 20
    assert set(answers) == possible
    assert version.rank == 0


@pytest.mark.real
def test_the_default_model_answers_as_edited(
    default_model: tuple[Any, Any], tmp_path: Path
) -> None:
    """Its file holds four bits a weight, of which transformers has the values in float32."""
    from lightning_edit.models import _default_file

    model, tokenizer = default_model
    edit = LoRA.from_model(model, tokenizer, preset="smollm2").edit(
        EditRequest("The capital of {} is", "France", "Rome")
    )
    edit.save(tmp_path / "delta")
    export(str(tmp_path / "delta"), "gguf", str(tmp_path / "lora"))
    prompts = (
        "The capital of France is", "The capital city of France is", "The capital of Spain is",
        "The Earth orbits the", "A week has seven",
    )  # fmt: skip

    def answers() -> list[str]:
        found = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            written = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
            found.append(str(tokenizer.decode(written)))
        return found

    base = answers()
    with edit.applied(model):
        edited = answers()
    assert edited[:2] != base[:2]
    adapter = tmp_path / "lora" / "adapter.gguf"
    with llama_server(_default_file(), [adapter]) as url:
        for name, wanted in (("adapter", edited), (None, base)):
            LlamaCpp(url).prefer(name)
            assert [_served(url, prompt, n_predict=2) for prompt in prompts] == wanted
