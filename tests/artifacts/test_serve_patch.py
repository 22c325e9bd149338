# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The verb that puts edits on a server, and one adapter of many edits."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_edit import MEMIT, EditRequest
from lightning_edit.__main__ import main
from lightning_edit.artifacts import export, serve_patch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError, ServerError
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.models import load_model
from tests import zoo
from tests.artifacts.helpers import low_rank_edit, made_run, saved_base, weights
from tests.serving.servers import sglang, speaking, transformers_serve, vllm


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(folder="first", seed=0)
    made_run(folder="second", seed=1)
    loaded: dict[str, str] = {}
    with speaking(vllm(loaded)) as (url, _):

        def run(*words: str) -> str:
            monkeypatch.setattr("sys.argv", ["lightning-edit", "serve-patch", *words])
            assert main(["serve-patch", *words]) == 0
            return capsys.readouterr().out

        printed = run("push", "first", "second", "--url", url, "--name", "facts")
        assert "Pushed facts-v1" in printed
        assert "100%" in printed
        run("push", "second", "--url", url, "--name", "facts", "--share", "0.25")
        printed = run("status", "--name", "facts")
        assert "75%" in printed
        assert "25%" in printed
        assert "adapter" in run("list", "--url", url)
        run("undo", "--url", url, "--name", "facts")
        assert list(loaded) == ["facts-v1"]
        assert "the base answers" in run("pull", "--url", url, "--name", "facts")
        assert loaded == {}
    monkeypatch.setattr("sys.argv", ["lightning-edit"])
    assert main(["serve-patch", "list", "--url", url]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lightning-edit serve-patch: No server answers at {url}")


def test_one_rank_for_all_modules() -> None:
    """vLLM and SGLang read ``r`` of the configuration, and no pattern of ranks."""
    made_run(folder="first", seed=0)
    made_run(folder="second", seed=1, layers=(2,))
    with speaking(sglang({})) as (url, _):
        serve_patch("push", ["first", "second"], "sglang", url)
    folder = Path("served/edits/v1")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {4}
    assert len(tensors) == 4


def test_a_whole_model_for_transformers() -> None:
    made_run()
    loaded: list[str] = []
    with speaking(transformers_serve(loaded)) as (url, _):
        serve_patch("push", ["run"], "transformers", url)
        assert loaded == [str(Path("served/edits/v1").absolute())]
        edited = weights("served/edits/v1")
        assert not all(torch.equal(edited[n], t) for n, t in weights("base").items())
        contents: Any = serve_patch("list", server="transformers", url=url)
        assert [one.name for one in contents.names] == ["edits-v1"]
        serve_patch("undo", server="transformers", url=url)
        with pytest.raises(ArtifactError, match="merges one edit"):
            serve_patch("make", ["run", "run"], "transformers")


def test_what_is_refused() -> None:
    made_run()
    with pytest.raises(ServerError, match="Edits are of `make` and `push`"):
        serve_patch("pull", ["run"])
    with pytest.raises(ServerError, match="no version yet"):
        serve_patch("push", url="http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match="There is no edit"):
        serve_patch("make")
    assert not Path("served").exists()


def test_many_edits_are_one_adapter(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = saved_base(model, tmp_path)
    edits = [low_rank_edit(model, base), 0.5 * low_rank_edit(zoo.build("llama", 1), base)]
    for i, edit in enumerate(edits):
        edit.save(tmp_path / f"delta{i}")
    whole = export("delta0", output="whole", others=["delta1"])
    assert whole.facts["left out"] == "nothing"
    assert whole.facts["rank"] == "2 to 6"
    with pytest.raises(ArtifactError, match="`others` is of adapters"):
        export("delta0", "hf", "merged", others=["delta1"])
    with pytest.raises(ArtifactError, match="`uniform` is of adapters"):
        export("delta0", "hf", "merged", uniform=True)
    other = WeightDelta(edits[1].changes, Provenance(base=BaseModelInfo(id="acme/other")))
    other.save(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"different base models: .*acme/other"):
        export("delta0", output="mixed", others=["other"])


def test_the_error_of_a_cut_is_told_of_each_module_and_in_all(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = saved_base(model, tmp_path)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    dense = {name: (i + 1) * torch.randn(32, 32) for i, name in enumerate(names)}
    WeightDelta(dense, Provenance(base=BaseModelInfo(id=base))).save(tmp_path / "delta")
    done = export("delta", output="lora", rank=4)
    tails = {n: torch.linalg.svdvals(t)[4:].square().sum() for n, t in dense.items()}
    squares = {n: t.square().sum() for n, t in dense.items()}
    worst = max(float((tails[n] / squares[n]).sqrt()) for n in names)
    in_all = float(
        (torch.stack([*tails.values()]).sum() / torch.stack([*squares.values()]).sum()).sqrt()
    )
    assert done.facts["left out"] == f"{worst:.2g} of the change at most"
    assert done.facts["left out in all"] == f"{in_all:.2g} of the change"


# transformers' own deprecation, called by peft
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_fifty_memit_edits_are_one_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = trained_tiny_model()
    base = saved_base(model, tmp_path)
    answers = [request.target_new for request in tiny_requests(10)]
    requests = [
        EditRequest("The capital of {} is", f"{place}{end}", answers[i % 10])
        for i, (place, end) in enumerate(product(("Vel", "Dor", "Ket", "Bru", "Ost"), "abcdefghij"))
    ]
    editor = MEMIT.from_model(model, tokenizer, layers=[0, 1], steps=2, cache_dir=str(tmp_path))
    before = _logits(model)
    for i in range(0, 50, 10):
        editor.commit(editor.edit(requests[i : i + 10]))
    edit = editor.committed()
    wanted = _logits(model)
    assert (wanted - before).abs().max() > 0.1
    edit.save(tmp_path / "delta")
    done = export("delta", output="lora", model=base, rank=32, uniform=True)
    assert done.facts["rank"] == "32"
    adapted = peft.PeftModel.from_pretrained(load_model(base), str(done.folder))
    torch.testing.assert_close(_logits(adapted), wanted, atol=1e-4, rtol=0)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.arange(2, 26).view(2, 12)).logits
    return logits
