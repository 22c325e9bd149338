# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Adapters as GGUF: names and rows are those of the files that llama.cpp reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit.artifacts import export
from lightning_edit.artifacts.gguf_adapter import ARCHITECTURES, save_gguf
from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError
from tests import zoo
from tests.artifacts.helpers import low_rank_edit, saved_base

gguf = pytest.importorskip("gguf")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = gguf.GGUFReader(path)
    return {t.name: torch.tensor(t.data).view(*map(int, t.shape[::-1])) for t in reader.tensors}


def _every_linear(model: Any) -> WeightDelta:
    """A change of rank 1 to 3 of every linear map in the blocks."""
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for i, (name, module) in enumerate(model.named_modules()):
        weight = getattr(module, "weight", None)
        if ".3." not in name and weight is not None and weight.ndim == 2 and "emb" not in name:
            if name.endswith(("wte", "wpe", "lm_head")):
                continue
            factors = (torch.randn(n, 1 + i % 3, generator=generator) for n in weight.shape)
            changes[f"{name}.weight"] = LowRank(*factors)
    return WeightDelta(changes)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "phi3"]
)
def test_transformers_reads_the_same_change(kind: str, tmp_path: Path) -> None:
    """Its reader of GGUF undoes what the writer of llama.cpp does to weights."""
    from transformers import modeling_gguf_pytorch_utils as reading

    model = zoo.build(kind)
    assert model.config.model_type in ARCHITECTURES
    delta = _every_linear(model)
    save_gguf(delta.to_lora(model), model.config, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = _tensors(tmp_path / "a.gguf")
    arch = ARCHITECTURES[model.config.model_type].name
    processor_of = reading.TENSOR_PROCESSORS.get(arch, reading.TensorProcessor)
    processor = processor_of(config=model.config.to_dict())
    names = reading.get_gguf_hf_weights_map(model, processor, model_type=arch)
    read = {}
    for name in {key.removesuffix(".lora_a").removesuffix(".lora_b") for key in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        change = (b @ a * (alpha / len(a))).numpy()
        found = processor.process(weights=change, name=name, tensor_key_mapping=names,
                                  parsed_parameters={"tensors": {}})  # fmt: skip
        read[names[name]] = torch.tensor(found.weights)
    assert read.keys() == delta.changes.keys()
    for name, change in read.items():
        torch.testing.assert_close(change, delta.dense(name), atol=1e-4, rtol=1e-5)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    model = zoo.build("gptneox")
    base = saved_base(model, tmp_path)
    low_rank_edit(model, base).save(tmp_path / "delta")
    with pytest.raises(ArtifactError, match=r"`gpt_neox` are not written as GGUF.*convert_lora"):
        export(str(tmp_path / "delta"), "gguf", str(tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()
    llama = zoo.build("llama")
    factors = low_rank_edit(llama).to_lora(llama)
    strange = {"model.layers.0.strange": next(iter(factors.values()))}
    with pytest.raises(ArtifactError, match=r"has no tensor for `model\.layers\.0\.strange`"):
        save_gguf(strange, llama.config, tmp_path / "a.gguf")


def test_export_writes_both_formats(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = saved_base(model, tmp_path)
    low_rank_edit(model, base).save(tmp_path / "delta")
    done = export(str(tmp_path / "delta"), "gguf", str(tmp_path / "lora"), uniform=True)
    assert {path.name for path in done.folder.iterdir()} >= {
        "adapter.gguf", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    ranks = {len(t) for n, t in _tensors(done.folder / "adapter.gguf").items() if n.endswith("_a")}
    assert ranks == {3}
    export(str(tmp_path / "delta"), "gguf", str(tmp_path / "lora"), force=True)
