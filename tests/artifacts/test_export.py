# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Exported edits are read by peft and transformers, and say what the edited model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit.artifacts import export
from lightning_edit.artifacts.adapters import model_skeleton, save_adapter
from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.demos import tiny_model
from lightning_edit.forgetting.adapter_vectors import load_adapter
from lightning_edit.models import load_model
from tests import zoo
from tests.artifacts.helpers import low_rank_edit, saved_base

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    # transformers' own deprecation, called by peft
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def _logits(model: Any, **more: Any) -> Tensor:
    ids = torch.arange(2, 26).view(2, 12)
    if model.config.is_encoder_decoder:
        more = {"decoder_input_ids": ids[:, :5]}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, **more).logits
    return logits


# -- LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "gptneox", "t5", "bart"])
def test_peft_reads_the_adapter(kind: str, tmp_path: Path) -> None:
    model = zoo.build(kind)
    base = saved_base(model, tmp_path)
    delta = low_rank_edit(model, base)
    delta.save(tmp_path / "delta")
    done = export(str(tmp_path / "delta"), "lora", str(tmp_path / "lora"))
    assert done.facts["left out"] == "nothing"
    before = _logits(model)
    with delta.applied(model):
        wanted = _logits(model)
    assert (wanted - before).abs().max() > 0.1

    adapted = peft.PeftModel.from_pretrained(load_model(base), str(done.folder))
    torch.testing.assert_close(_logits(adapted), wanted, atol=1e-4, rtol=0)
    touched = {n.split(".lora_A")[0] for n, _ in adapted.named_modules() if ".lora_A." in n}
    assert touched == {f"base_model.model.{n.removesuffix('.weight')}" for n in delta.changes}
    with adapted.disable_adapter():
        torch.testing.assert_close(_logits(adapted), before)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(_logits(merged), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_adapter_is_the_edit(kind: str, tmp_path: Path) -> None:
    model = zoo.build(kind)
    delta = low_rank_edit(model, saved_base(model, tmp_path))
    delta.save(tmp_path / "delta")
    export(str(tmp_path / "delta"), output=str(tmp_path / "lora"))
    loaded = load_adapter(tmp_path / "lora", model)
    assert loaded.changes.keys() == delta.changes.keys()
    for name in delta.changes:
        assert torch.equal(loaded.dense(name), delta.dense(name))


def test_ranks_by_module(tmp_path: Path) -> None:
    model = zoo.build("llama")
    delta = low_rank_edit(model, "acme/tiny")
    save_adapter(delta.to_lora(model), tmp_path / "lora", provenance=delta.provenance)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    down = "model.layers.{}.mlp.down_proj"
    assert config["r"] == config["lora_alpha"] == 2
    assert config["rank_pattern"] == {down.format(0): 1, down.format(2): 3}
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert set(config["target_modules"]) == {
        *(down.format(i) for i in range(3)),
        "model.layers.0.self_attn.o_proj",
    }
    assert config["base_model_name_or_path"] == "acme/tiny"
    assert config["fan_in_fan_out"] is False
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "lora"))
    assert read.peft_type == "LORA"
    assert read.task_type == "CAUSAL_LM"
    card = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert "base_model: acme/tiny" in card
    assert "| `model.layers.2.mlp.down_proj` | 3 | 0 |" in card
    assert 'AutoModelForCausalLM.from_pretrained("acme/tiny")' in card


def test_many_modules_and_no_other(tmp_path: Path) -> None:
    """peft shortens long lists of modules; layer 1 must not become layer 11."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=24,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(1, 23)]
    delta = WeightDelta({n: LowRank(torch.ones(8, 1 + i), torch.ones(8, 1 + i))
                         for i, n in enumerate(names)})  # fmt: skip
    save_adapter(delta.to_lora(model), tmp_path / "lora", provenance=delta.provenance)
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora"))
    ranks = {n: m.r["default"] for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {
        f"base_model.model.{n.removesuffix('.weight')}": 1 + i for i, n in enumerate(names)
    }


def test_a_dense_change_is_cut_and_says_so(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = saved_base(model, tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    dense = torch.randn(32, 32)
    WeightDelta({name: dense}).save(tmp_path / "delta")
    arguments: dict[str, Any] = {"delta": str(tmp_path / "delta"), "model": base}
    with pytest.raises(ArtifactError, match="Give a `rank` to cut it to"):
        export(**arguments, output=str(tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()
    done = export(**arguments, output=str(tmp_path / "lora"), rank=4)
    values = torch.linalg.svdvals(dense)
    error = float(values[4:].square().sum().sqrt() / values.square().sum().sqrt())
    assert done.facts["left out"] == f"{error:.2g} of the change at most"
    assert done.notes == (f"The most is left out of `{name.removesuffix('.weight')}`.",)
    assert f"| 4 | {error:.2g} |" in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    whole = export(**arguments, output=str(tmp_path / "whole"), rank=32)
    adapted = peft.PeftModel.from_pretrained(load_model(base), str(whole.folder))
    with torch.no_grad():
        model.get_parameter(name).add_(dense)
    torch.testing.assert_close(_logits(adapted), _logits(model), atol=1e-4, rtol=0)


def test_what_an_adapter_cannot_hold(tmp_path: Path) -> None:
    base = saved_base(tiny_model(), tmp_path)
    delta = WeightDelta({"model.norm.weight": torch.ones(32)})
    delta.save(tmp_path / "delta")
    with pytest.raises(ArtifactError, match=r"changes `model.norm.weight` \(LlamaRMSNorm\) too"):
        export(str(tmp_path / "delta"), "lora", str(tmp_path / "lora"), base)
    with pytest.raises(ArtifactError, match="changes nothing"):
        save_adapter({}, tmp_path / "lora", provenance=Provenance())
    assert not (tmp_path / "lora").exists()


def test_only_the_configuration_is_needed(tmp_path: Path) -> None:
    model = zoo.build("gpt2")
    low_rank_edit(model).save(tmp_path / "delta")
    model.config.save_pretrained(tmp_path / "base")
    done = export(
        str(tmp_path / "delta"), output=str(tmp_path / "lora"), model=str(tmp_path / "base")
    )
    adapted = peft.PeftModel.from_pretrained(zoo.build("gpt2"), str(done.folder))
    low_rank_edit(model).apply_(model)
    torch.testing.assert_close(_logits(adapted), _logits(model), atol=1e-4, rtol=0)


def test_skeleton() -> None:
    with pytest.raises(ModelError, match="is not found"):
        model_skeleton("./nowhere")


def test_skeleton_of_a_damaged_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing known"}')
    with pytest.raises(ModelError, match="which says how its weights are stored"):
        model_skeleton(str(tmp_path))


# -- whole models ----------------------------------------------------------------------------


def test_hf_is_the_edited_model(tmp_path: Path) -> None:
    model = zoo.build("gpt2")
    base = saved_base(model, tmp_path)
    delta = low_rank_edit(model, base)
    delta.save(tmp_path / "delta")
    done = export(str(tmp_path / "delta"), "hf", str(tmp_path / "merged"))
    assert done.what == "edited model"
    delta.apply_(model)
    loaded = load_model(str(tmp_path / "merged"))
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    with pytest.raises(ArtifactError, match="`rank` is of adapters"):
        export(str(tmp_path / "delta"), "hf", str(tmp_path / "other"), rank=3)


# -- the default model -----------------------------------------------------------------------


@pytest.fixture
def rank_two() -> WeightDelta:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, 2, generator=generator) for n in (576, 1536))
    name = "model.layers.5.mlp.down_proj.weight"
    change = LowRank(0.02 * u, v)
    return WeightDelta({name: change}, Provenance("ROME", base=BaseModelInfo(id="smollm2")))


@pytest.mark.real
def test_adapter_of_the_default_model(
    default_model: tuple[Any, Any], rank_two: WeightDelta, tmp_path: Path
) -> None:
    model, tokenizer = default_model
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        before = model(**prompt).logits
        with rank_two.applied(model):
            wanted = model(**prompt).logits
    assert (wanted - before).abs().max() > 1
    rank_two.save(tmp_path / "delta")
    export(str(tmp_path / "delta"), output=str(tmp_path / "lora"))
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora"))
    with torch.no_grad():
        logits = adapted(**prompt).logits
    adapted.unload()
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
