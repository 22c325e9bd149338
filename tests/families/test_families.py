# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Models that hold more than attention and an MLP, or less: found, edited, measured, refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_edit import (
    GRACE,
    KN,
    ROME,
    SERAC,
    EditEvaluator,
    EditModule,
    FineTune,
    LocFT,
    LoRA,
    UltraEdit,
)
from lightning_edit.core.errors import EditError, LocatorError, ModelError
from lightning_edit.core.locator import Locator, ModelTree
from lightning_edit.core.probe import is_causal
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
from tests.callbacks.foreign import data_of
from tests.families import table
from tests.families.architectures import ARCHITECTURES, build
from tests.families.measure import edited, evaluator, loaded, measure, places
from tests.modules.helpers import bare_trainer, fingerprint

# The keys of tiny models with random weights lie where all keys are.
pytestmark = pytest.mark.filterwarnings("ignore:Request .* have a cosine of:UserWarning")

# Of each layer the MLP's last projection, and attention's where there is one.
PLACES: dict[str, list[tuple[str, str]]] = {
    "gemma3n": [("mlp.down_proj", "self_attn.o_proj")] * 4,
    "gemma4": [("mlp.down_proj", "self_attn.o_proj")] * 4,
    "qwen3_5": [("mlp.down_proj", "linear_attn.out_proj"), ("mlp.down_proj", "self_attn.o_proj")],
    "qwen3_next": [
        ("mlp.down_proj", "linear_attn.out_proj"),
        ("mlp.experts.down_proj", "self_attn.o_proj"),
    ],
    "granite4": [
        ("shared_mlp.output_linear", ""),
        ("shared_mlp.output_linear", "self_attn.o_proj"),
    ],
    "falcon_h1": [("feed_forward.down_proj", "self_attn.o_proj")] * 2,
    "bamba": [("feed_forward.down_proj", ""), ("feed_forward.down_proj", "self_attn.o_proj")],
    "jamba": [
        ("feed_forward.down_proj", ""),
        ("feed_forward.experts.down_proj", "self_attn.o_proj"),
    ],
    "zamba2": [("", ""), ("", "shared_transformer.self_attn.o_proj")],
    "lfm2": [("feed_forward.w2", ""), ("feed_forward.w2", "self_attn.out_proj")],
    "nemotron_h": [
        ("", ""),
        ("mixer.down_proj", ""),
        ("", "mixer.o_proj"),
        ("mixer.down_proj", ""),
    ],
    "mamba": [("mixer.out_proj", "")] * 2,
    "recurrent_gemma": [
        *[("mlp_block.down_proj", "")] * 2,
        ("mlp_block.down_proj", "temporal_block.o_proj"),
    ],
    "rwkv": [("feed_forward.value", "attention.output")] * 2,
    "kimi_linear": [
        ("mlp.down_proj", "self_attn.o_proj"),
        ("mlp.experts.down_proj", "self_attn.o_proj"),
    ],
    "switch": [("layer.2.mlp.wo", "layer.0.SelfAttention.o"), ("", "layer.0.SelfAttention.o")],
    "bert": [("output.dense", "attention.output.dense")] * 2,
    "qwen2_vl": [("mlp.down_proj", "self_attn.o_proj")] * 2,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers tells of kernels that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


def test_places_are_found_by_what_they_do(subtests: pytest.Subtests) -> None:
    for name, wanted in PLACES.items():
        with subtests.test(name):
            model = build(name)
            tree = ModelTree.of(model)
            found, _ = places(model)
            attention = []
            for layer, block in enumerate(tree.block_names):
                try:
                    site = tree.attention_out(layer)
                    attention.append(site.module_name.removeprefix(f"{block}."))
                except LocatorError:
                    attention.append("")
            assert list(zip(found, attention, strict=True)) == wanted
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_probe_leaves_a_model_as_it_was_and_does_not_mind_dropout() -> None:
    model = build("falcon_h1").train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    [site] = Locator([1]).sites(model)
    assert site.module_name.endswith("feed_forward.down_proj")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_readers_of_what_was_probed() -> None:
    tree = ModelTree.of(build("falcon_h1"))
    names = [site.module_name.rpartition(".")[2] for site in tree.mlp_in(0)]
    assert names == ["gate_proj", "up_proj"]
    inputs = [site.module_name for site in ModelTree.of(build("bert")).attention_in(0)]
    assert [name.rpartition("self.")[2] for name in inputs] == ["query", "key", "value"]


def test_a_block_of_two_mlps_is_refused_with_their_names() -> None:
    model: Any = build("llama")
    block = model.model.layers[1]
    block.more = type(block.mlp)(model.config)

    def forward(x: torch.Tensor, own: Any = block.mlp.forward) -> torch.Tensor:
        both: torch.Tensor = own(x) + block.more(x)
        return both

    block.mlp.forward = forward
    message = r"Layer 1 .* has 2 MLPs: `mlp.down_proj`, `more.down_proj`.*`modules=\['mlp.down"
    with pytest.raises(LocatorError, match=message):
        ModelTree.of(model).mlp_out(1)
    editor = UltraEdit.from_model(model, tiny_tokenizer(), layers=[1], modules=["more.down_proj"])
    assert list(editor.edit(tiny_requests(2)).changes) == ["model.layers.1.more.down_proj.weight"]
    with pytest.raises(LocatorError, match=r"has several times: .*mlp.down_proj, .*more.down_proj"):
        UltraEdit.from_model(model, tiny_tokenizer(), layers=[1], modules=["down_proj"])


def test_a_model_that_cannot_be_run_is_refused_with_the_reason() -> None:
    model: Any = build("falcon_h1")
    model.model.layers[0].feed_forward.forward = None
    with pytest.raises(LocatorError, match=r"cannot be run to see .*TypeError.*mamba.out_proj"):
        ModelTree.of(model).mlp_out(1)


def test_evaluator_equals_single_rows(subtests: pytest.Subtests) -> None:
    for name in ("qwen3_5", "falcon_h1", "lfm2", "mamba", "rwkv", "recurrent_gemma", "mbart"):
        with subtests.test(name):
            assert evaluator(build(name)) == "ok"


def test_edits_of_what_runs_whole(subtests: pytest.Subtests) -> None:
    for name, methods in {
        "qwen3_5": ("ROME", "MEMIT"),
        "lfm2": ("GRACE",),
        "gemma3n": ("ROME",),
        "rwkv": ("ROME", "GRACE"),
    }.items():
        model = build(name)
        for method in methods:
            with subtests.test(f"{name}, {method}"):
                assert edited(model, method, 0) == "ok"


def test_a_run_with_the_evaluator_goes_through(subtests: pytest.Subtests) -> None:
    for name in ("lfm2", "mamba"):
        with subtests.test(name):
            model = build(name)
            before = fingerprint(model)
            editor = FineTune.from_model(model, tiny_tokenizer(), layers=[0], steps=2)
            bare_trainer(max_epochs=1, callbacks=[EditEvaluator()]).fit(editor, data_of())
            assert "edit/reliability/teacher_forced" in editor.trainer.callback_metrics
            with editor.committed().reverted(model):
                assert fingerprint(model) == before


def test_attention_is_adapted_where_there_is_one() -> None:
    edit = LoRA.from_model(build("granite4"), tiny_tokenizer(), steps=1).edit(tiny_requests(1))
    assert {name.split(".")[2] for name in edit.changes} == {"1"}


def test_several_streams_are_refused_by_what_needs_one() -> None:
    said = ""
    try:
        edited(build("gemma3n"), "MEMIT", 0)
    except EditError as error:
        said = str(error)
    assert "more than one stream of hidden states" in said


def test_a_second_model_needs_keys_and_values_to_go_with() -> None:
    with pytest.raises(ModelError, match=r"Lfm2ForCausalLM hands on more than .* such as GRACE"):
        SERAC.from_model(build("lfm2"), tiny_tokenizer())


def test_encoders_alone_are_refused_by_everything(subtests: pytest.Subtests) -> None:
    editors: tuple[type[EditModule[Any]], ...] = (ROME, FineTune, GRACE, LoRA, KN)
    for name in ("bert", "distilbert"):
        model = build(name)
        for editor in editors:
            refused = pytest.raises(ModelError, match="is an encoder alone")
            with subtests.test(f"{name}, {editor.__name__}"), refused:
                editor.from_model(model, tiny_tokenizer())
        for check in (evaluator, loaded):
            refused = pytest.raises(ModelError, match="is an encoder alone")
            with subtests.test(f"{name}, {check.__name__}"), refused:
                check(model)


def test_a_bert_that_decodes_is_none_of_these() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = ARCHITECTURES["bert"][1]
    config = BertConfig(**sizes, vocab_size=len(tiny_tokenizer()), is_decoder=True)
    assert is_causal(BertLMHeadModel(config).eval())
    assert not is_causal(build("bert"))
    assert is_causal(tiny_model())


def test_what_is_advised_for_mixtures_of_experts_works(subtests: pytest.Subtests) -> None:
    for name, plain in (("mixtral", ""), ("deepseek_v3", r"a layer with a plain MLP \(0\), or ")):
        model = build(name)
        message = f"Choose {plain}a method that edits experts, such as ROME, MEMIT or FineTune"
        with pytest.raises(LocatorError, match=message):
            Locator([1]).sites(model)
        editors: tuple[EditModule[Any], ...] = (
            LoRA.from_model(model, tiny_tokenizer(), layers=[1], steps=2),
            GRACE.from_model(model, tiny_tokenizer(), layers=[1], module="attention_out", steps=2),
        )
        for editor in editors:
            with subtests.test(f"{name}, {type(editor).__name__}"):
                edit = editor.edit(tiny_requests(1))
                edit.apply_(model)
                edit.revert_(model)


def test_what_tunes_or_remembers_takes_mixtures_by_default_places(
    subtests: pytest.Subtests,
) -> None:
    for name in ("gpt_oss", "deepseek_v3"):
        model = build(name)
        before = fingerprint(model)
        editors: tuple[EditModule[Any], ...] = (
            FineTune.from_model(model, tiny_tokenizer(), lr=5e-3, steps=3),
            LocFT.from_model(model, tiny_tokenizer(), lr=5e-3),
            LoRA.from_model(model, tiny_tokenizer(), lr=5e-3, steps=3),
            GRACE.from_model(model, tiny_tokenizer(), steps=3),
        )
        for editor in editors:
            with subtests.test(f"{name}, {type(editor).__name__}"):
                [request] = tiny_requests(1)
                asked = editor.session.measured([request])[request.id]
                edit = editor.edit(request)
                assert fingerprint(model) == before
                assert edit.details["requests"][0]["p_target"] > asked["p_target"]
                with edit.applied(model):
                    assert fingerprint(model) != before
                assert fingerprint(model) == before


def test_models_that_see_are_loaded(subtests: pytest.Subtests) -> None:
    for name in ("llava", "qwen2_vl", "gemma3_mm"):
        with subtests.test(name):
            assert loaded(build(name)) == "ok"


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_is_measured(subtests: pytest.Subtests) -> None:
    written = table.PAGE.read_text().splitlines()
    for name in ARCHITECTURES:
        with subtests.test(name):
            assert table.line_of(measure(name, build(name))) in written


def test_the_table_in_the_docs_is_of_all_architectures() -> None:
    text = table.PAGE.read_text()
    rows = text.partition("## The table")[2].splitlines()
    assert sum(row.startswith("| ") for row in rows) == 1 + len(ARCHITECTURES)
    assert "BAD" not in text
