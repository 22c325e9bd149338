# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The locator finds the right weights, the right way round, in every architecture of the zoo."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lightning_edit.core.errors import LocatorError
from lightning_edit.core.locator import Locator, ModelTree, ModuleKind, StackKind, WeightSite
from tests import zoo

_LLAMA = ("model.layers.{}", "mlp.down_proj", ["mlp.gate_proj", "mlp.up_proj"], "self_attn.o_proj")
_QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
_KVQ = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]
_BART = ("fc2", ["fc1"], "self_attn.out_proj", _KVQ)
_T5_ATTENTION = [f"layer.0.SelfAttention.{name}" for name in "qkv"]

# kind and stack -> block, MLP output, MLP inputs, attention output, attention inputs
NAMES: dict[tuple[str, str], tuple[str, str, list[str], str, list[str]]] = {
    **{
        (kind, "decoder"): (*_LLAMA, _QKV)
        for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")
    },
    ("gpt2", "decoder"): (
        "transformer.h.{}",
        "mlp.c_proj",
        ["mlp.c_fc"],
        "attn.c_proj",
        ["attn.c_attn"],
    ),
    ("gptj", "decoder"): (
        "transformer.h.{}",
        "mlp.fc_out",
        ["mlp.fc_in"],
        "attn.out_proj",
        ["attn.k_proj", "attn.v_proj", "attn.q_proj"],
    ),
    ("gptneox", "decoder"): (
        "gpt_neox.layers.{}",
        "mlp.dense_4h_to_h",
        ["mlp.dense_h_to_4h"],
        "attention.dense",
        ["attention.query_key_value"],
    ),
    ("opt", "decoder"): ("model.decoder.layers.{}", *_BART),
    ("phi", "decoder"): ("model.layers.{}", "mlp.fc2", ["mlp.fc1"], "self_attn.dense", _QKV),
    ("phi3", "decoder"): (
        "model.layers.{}",
        "mlp.down_proj",
        ["mlp.gate_up_proj"],
        "self_attn.o_proj",
        ["self_attn.qkv_proj"],
    ),
    ("falcon", "decoder"): (
        "transformer.h.{}",
        "mlp.dense_4h_to_h",
        ["mlp.dense_h_to_4h"],
        "self_attention.dense",
        ["self_attention.query_key_value"],
    ),
    ("bart", "decoder"): ("model.decoder.layers.{}", *_BART),
    ("bart", "encoder"): ("model.encoder.layers.{}", *_BART),
    **{
        (kind, stack): (
            f"{stack}.block.{{}}",
            f"layer.{at}.DenseReluDense.wo",
            [f"layer.{at}.DenseReluDense.{name}" for name in inputs],
            "layer.0.SelfAttention.o",
            _T5_ATTENTION,
        )
        for kind, inputs in (("t5", ["wi"]), ("flan_t5", ["wi_0", "wi_1"]))
        for stack, at in (("encoder", 1), ("decoder", 2))
    },
}
FINAL_NORMS = {
    "gpt2": "transformer.ln_f",
    "gptj": "transformer.ln_f",
    "falcon": "transformer.ln_f",
    "gptneox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "phi": "model.final_layernorm",
    "t5": "decoder.final_layer_norm",
    "flan_t5": "decoder.final_layer_norm",
    "bart": None,
}
MODULES: tuple[ModuleKind, ...] = ("mlp_out", "mlp_in", "attention_out", "attention_in")
CASES = [pytest.param(*case, id="-".join(case)) for case in NAMES]


def _run(model: nn.Module) -> None:
    ids = torch.tensor([[5, 9, 200, 31]])
    more: dict[str, Any] = (
        {"decoder_input_ids": ids[:, :3]} if cast(Any, model).config.is_encoder_decoder else {}
    )
    with torch.no_grad():
        model(input_ids=ids, **more)


def _calls(model: nn.Module, modules: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """First input and output of each module in one forward pass, in the order of the calls."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        # Copies: some models add to an output in place.
        seen.append((first.clone(), (out[0] if isinstance(out, tuple) else out).clone()))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    _run(model)
    for hook in hooks:
        hook.remove()
    return seen


def test_zoo_is_covered() -> None:
    assert {kind for kind, _ in NAMES} == set(zoo.KINDS)


@pytest.mark.parametrize(("kind", "stack"), CASES)
def test_names(kind: str, stack: StackKind) -> None:
    model = zoo.build(kind)
    block, mlp_out, mlp_in, attention_out, attention_in = NAMES[kind, stack]
    wanted = {
        "mlp_out": [mlp_out],
        "mlp_in": mlp_in,
        "attention_out": [attention_out],
        "attention_in": attention_in,
    }
    for module in MODULES:
        for layers, expected in ((None, range(zoo.LAYERS)), ([-1], [zoo.LAYERS - 1])):
            sites = Locator(layers, module, stack).sites(model)
            assert [(site.layer, site.name) for site in sites] == [
                (layer, f"{block.format(layer)}.{name}.weight")
                for layer in expected
                for name in wanted[module]
            ]


@pytest.mark.parametrize(("kind", "stack"), CASES)
def test_orientation(kind: str, stack: StackKind) -> None:
    """`read` times the module's input is its output less the bias."""
    model = zoo.build(kind)
    for module in MODULES:
        for site in Locator([1], module, stack).sites(model):
            linear = site.module(model)
            weight_OI = site.read(model)
            assert weight_OI.shape == (site.out_features, site.in_features)
            assert site.transposed == (kind == "gpt2")
            [(input_I, output_O)] = _calls(model, [linear])
            bias = getattr(linear, "bias", None)
            expected = output_O if bias is None else output_O - bias
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(input_I @ weight_OI.T, expected, atol=1e-5, rtol=1e-4)
            # A view: what is written in the parameter's layout is read as [O, I].
            delta_OI = torch.randn(weight_OI.shape)
            before = weight_OI.clone()
            with torch.no_grad():
                site.parameter(model).add_(site.orient(delta_OI))
            assert torch.equal(weight_OI, before + delta_OI)


@pytest.mark.parametrize(("kind", "stack"), CASES)
def test_containers(kind: str, stack: StackKind) -> None:
    """`mlp` and `attention` return what their last projections return."""
    model = zoo.build(kind)
    tree = ModelTree.of(model, stack)
    for container, site in (
        (tree.mlp(0), tree.mlp_out(0)),
        (tree.attention(0), tree.attention_out(0)),
    ):
        if container is site.module(model):
            continue
        calls = _calls(model, [site.module(model), container])
        assert len(calls) == 2
        assert torch.equal(calls[0][1], calls[1][1])


@pytest.mark.parametrize(("kind", "stack"), CASES)
def test_tree(kind: str, stack: StackKind) -> None:
    model = zoo.build(kind)
    tree = ModelTree.of(model, stack)
    assert len(tree.blocks) == len(tree.block_names) == zoo.LAYERS
    assert tree.hidden_size == 32
    assert tree.is_encoder_decoder == (kind in zoo.ENCODER_DECODERS)
    assert [model.get_submodule(name) for name in tree.block_names] == tree.blocks
    final_norm = FINAL_NORMS.get(kind, "model.norm")
    if final_norm is None:
        assert tree.final_norm is None
    else:
        final_norm = final_norm.replace("decoder", stack)
        assert tree.final_norm is model.get_submodule(final_norm)
    assert tree.lm_head is model.lm_head
    # The embedding is called, and the stack runs from the first block to the last.
    modules = [cast(nn.Module, tree.input_embeddings), *tree.blocks]
    calls = _calls(model, modules)
    assert len(calls) == len(modules)
    assert calls[0][0].dtype == torch.int64
    for (_, out), (following, _) in pairwise(calls[1:]):
        assert torch.equal(out, following)


def test_layers_are_sorted_and_counted_once() -> None:
    model = zoo.build("llama")
    sites = Locator([-1, 0, 2]).sites(model)
    assert [site.layer for site in sites] == [0, 2]


@pytest.mark.parametrize("layer", [3, -4])
def test_missing_layer(layer: int) -> None:
    with pytest.raises(LocatorError, match=rf"Layer {layer} does not exist.*3 layers.*0 to 2"):
        Locator([layer]).sites(zoo.build("llama"))


def test_missing_encoder() -> None:
    with pytest.raises(LocatorError, match="no encoder beside its decoder"):
        Locator(stack="encoder").sites(zoo.build("opt"))


def test_no_blocks() -> None:
    with pytest.raises(LocatorError, match=r"no stack of transformer blocks.* 0, 1\."):
        Locator().sites(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 5}, r"list of whole numbers, such as \[5\].*got 5"),
        ({"layers": ["last"]}, "list of whole numbers"),
        ({"layers": [True]}, "list of whole numbers"),
        ({"module": "mlp"}, "`module` is expected to be one of mlp_out, mlp_in.*'mlp'"),
        ({"stack": "both"}, "`stack` is expected to be one of decoder, encoder"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LocatorError, match=message):
        Locator(**arguments)


def test_experts_are_refused() -> None:
    model = zoo.build("mixtral")
    message = r"layer 1 is a mixture of experts: `model.layers.1.mlp.experts.\w+` of shape \[4, "
    with pytest.raises(LocatorError, match=message):
        Locator([1]).sites(model)
    [site] = Locator([1], "attention_out").sites(model)
    assert site.name == "model.layers.1.self_attn.o_proj.weight"


def test_experts_beside_plain_layers() -> None:
    """DeepSeek begins with plain layers; its experts come with a shared MLP, which is not all."""
    model = zoo.build("deepseek")
    [site] = Locator([0]).sites(model)
    assert site.name == "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(LocatorError, match="layer 2 is a mixture of experts"):
        Locator([2]).sites(model)


def test_experts_in_a_list() -> None:
    model = zoo.build("llama")
    layer = model.model.layers[1]
    layer.mlp = nn.ModuleList([layer.mlp, copy.deepcopy(layer.mlp)])
    with pytest.raises(LocatorError, match=r"2 modules in `model.layers.1.mlp`"):
        Locator([1]).sites(model)


def test_block_without_mlp() -> None:
    model = zoo.build("llama")
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(LocatorError, match=r"Layer 1 .*no MLP.*`mlp` \(Identity\)"):
        Locator([1]).sites(model)


def test_site_of_another_model() -> None:
    [site] = Locator([0]).sites(zoo.build("llama"))
    with pytest.raises(LocatorError, match="OPTForCausalLM has no parameter"):
        site.parameter(zoo.build("opt"))


def test_quantized_weight() -> None:
    model = zoo.build("llama")
    linear = model.model.layers[0].mlp.down_proj
    packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(LocatorError, match=r"down_proj.weight` is torch.uint8.*quantized"):
        Locator([0]).sites(model)


def test_projection_of_embeddings() -> None:
    """OPT-350m embeds in fewer dimensions than its blocks have."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=40,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=1,
        do_layer_norm_before=False,
    )
    tree = ModelTree.of(OPTForCausalLM(config))
    assert tree.hidden_size == 32
    assert tree.mlp_out(0).name == "model.decoder.layers.0.fc2.weight"
    assert tree.final_norm is None


def test_language_model_beside_a_vision_tower() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40}
    config = Gemma3Config(text_config=text, vision_config={**sizes, "num_hidden_layers": 4})
    tree = ModelTree.of(Gemma3ForConditionalGeneration(config))
    assert tree.block_names == ["model.language_model.layers.0", "model.language_model.layers.1"]


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft
def test_adapter() -> None:
    """Of a layer that PEFT wraps, the wrapped weight is meant, not the adapter's factors."""
    peft = pytest.importorskip("peft")
    model = zoo.build("llama")
    plain = [site.read(model) for site in Locator([1], "mlp_in").sites(model)]
    config = peft.LoraConfig(r=2, target_modules=["down_proj", "up_proj", "o_proj"])
    wrapped = peft.get_peft_model(model, config)
    tree = ModelTree.of(wrapped)
    name = "base_model.model.model.layers.1.mlp"
    assert tree.mlp_out(1).name == f"{name}.down_proj.base_layer.weight"
    assert tree.mlp(1) is wrapped.get_submodule(name)
    sites = Locator([1], "mlp_in").sites(wrapped)
    assert [site.name for site in sites] == [
        f"{name}.gate_proj.weight",
        f"{name}.up_proj.base_layer.weight",
    ]
    assert all(
        torch.equal(site.read(wrapped), weight) for site, weight in zip(sites, plain, strict=True)
    )


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sharded_weight(kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = zoo.build(kind)
    [before] = [site.read(model).clone() for site in Locator([1]).sites(model)]
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    [site] = Locator([1]).sites(model)
    assert isinstance(site.parameter(model), DTensor)
    weight = site.read(model)
    assert not isinstance(weight, DTensor)
    assert torch.equal(weight, before)


def test_site_is_a_value() -> None:
    """Sites are compared and hashed by what they name, so that they serve as keys."""
    first, second = (Locator([1]).sites(zoo.build("llama")) for _ in range(2))
    assert first == second
    assert len({*first, *second}) == 1
    assert isinstance(first[0], WeightSite)
