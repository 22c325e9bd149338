# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Weights that no edit can be added to, and tokens that a model does not know, are refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lightning_edit import ROME, EditRequest, WeightDelta
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import ModelError, RequestError
from lightning_edit.core.plain_model import check_weights
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
from lightning_edit.evaluation.prose import perplexity
from lightning_edit.evaluation.scoring import continuations, score_targets
from lightning_edit.tracing.causal_tracing import trace_facts
from tests.contract.enumeration import EDITORS, LEARNERS, quick
from tests.modules.helpers import circumstances

NAME = "model.layers.1.mlp.down_proj.weight"


class Halves(Tensor):
    """A tensor that shows numbers which it does not keep, as those of quantizers do."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)


class QLinear(nn.Linear):
    """A quantizer's module, whose weights may be plain still."""


class Dynamic(nn.Linear):
    """A module as torch's own quantization puts it into a model."""


QLinear.__module__ = "optimum.quanto.nn.qlinear"
Dynamic.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"


def _tensor(model: Any) -> None:
    layer = model.get_submodule(NAME.removesuffix(".weight"))
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Halves))


def _module(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.__class__ = QLinear


def _mark(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.quantization_scheme = "W8A8"


def _packed(model: Any) -> None:
    packed = torch.zeros(16, 32, dtype=torch.int32)
    model.model.layers[1].mlp.down_proj.register_buffer("qweight", packed)


def _dynamic(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.__class__ = Dynamic


def _meta(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.to("meta")


def _hook(model: Any) -> None:
    hook = SimpleNamespace(hooks=(SimpleNamespace(offload=True),))
    model.model.layers[1].mlp._hf_hook = hook


QUANTIZED: list[Callable[[Any], None]] = [_tensor, _module, _mark, _packed, _dynamic]
OFFLOADED: list[Callable[[Any], None]] = [_meta, _hook]


def test_every_editor_refuses_what_cannot_be_edited_before_anything(
    subtests: pytest.Subtests,
) -> None:
    for make in (*QUANTIZED, *OFFLOADED):
        model = tiny_model()
        make(model)
        before = circumstances(model)
        words = "is quantized: `model" if make in QUANTIZED else "is not in memory as a whole"
        for name, cls in {**EDITORS, **LEARNERS}.items():
            settings = {"checkpoint": "none"} if name == "TrainedEditor" else quick(cls)
            with (
                subtests.test(f"{name} {make.__name__}"),
                pytest.raises(ModelError, match=words),
            ):
                cls.from_model(model, tiny_tokenizer(), **settings)
        assert circumstances(model) == before


def test_an_edit_is_not_added_to_them_either() -> None:
    edit = WeightDelta({NAME: LowRank(torch.ones(32, 1), torch.ones(128, 1))})
    for make, words in ((_tensor, "is quantized"), (_meta, "not in memory")):
        model = tiny_model()
        make(model)
        with pytest.raises(ModelError, match=words):
            edit.apply_(model, check=False)


def test_hooks_of_accelerate_are_known() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_model(), execution_device="cpu")
    with pytest.raises(ModelError, match=r"not in memory as a whole.*Load it without `device_map`"):
        check_weights(model)
    with pytest.raises(ModelError, match="not in memory as a whole"):
        continuations(model, PromptTokenizer(tiny_tokenizer()), ["The capital of"])
    model = accelerate.dispatch_model(tiny_model(), {"": "cpu"}, force_hooks=True)
    check_weights(model)  # hooks that leave weights where they are


def test_quantizers_that_are_installed_are_known(subtests: pytest.Subtests) -> None:
    def quanto(model: Any) -> None:
        module = importlib.import_module("optimum.quanto")
        module.quantize(model, weights=module.qint8)
        module.freeze(model)

    def torchao(model: Any) -> None:
        module = importlib.import_module("torchao.quantization")
        module.quantize_(model, module.Int8WeightOnlyConfig())

    for make, package in ((quanto, "optimum.quanto"), (torchao, "torchao")):
        with subtests.test(package):
            pytest.importorskip(package)
            model = tiny_model()
            make(model)
            with pytest.raises(ModelError, match="is quantized"):
                check_weights(model)


def _of(package: str, *bases: type) -> Any:
    """A class as a package that is not installed has it."""
    return type("Foreign", bases, {"__module__": package})


def _four_bits(layer: nn.Linear) -> nn.Module:
    """As bitsandbytes: packed bytes as the parameter, and how to read them beside it."""
    weights: Any = _of("bitsandbytes.nn.modules", nn.Parameter)
    packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
    module = _of("bitsandbytes.nn.modules", nn.Linear)(1, 1, bias=False)
    module.weight = weights(packed, requires_grad=False)
    module.weight.quant_state = SimpleNamespace(shape=layer.weight.shape)
    return cast(nn.Module, module)


def _eight_bits(layer: nn.Linear) -> nn.Module:
    """As bitsandbytes: whole numbers, and a scale for each row."""
    module = _of("bitsandbytes.nn.modules", nn.Linear)(1, 1, bias=False)
    weights: Any = _of("bitsandbytes.nn.modules", nn.Parameter)
    module.weight = weights(layer.weight.detach().char(), requires_grad=False)
    module.weight.SCB = torch.ones(layer.out_features)
    return cast(nn.Module, module)


def _before_it_moves(layer: nn.Linear) -> nn.Module:
    """As bitsandbytes on the CPU: plain numbers, which are packed when the model moves to a GPU."""
    module = _of("bitsandbytes.nn.modules", nn.Linear)(1, 1, bias=False)
    module.weight = layer.weight
    return cast(nn.Module, module)


def _packed_in(package: str) -> Callable[[nn.Linear], nn.Module]:
    """As GPTQ and AWQ: no weight at all, but packed numbers in buffers."""

    def make(layer: nn.Linear) -> nn.Module:
        module = cast(nn.Module, _of(package, nn.Module)())
        rows, columns = layer.out_features, layer.in_features
        module.register_buffer("qweight", torch.zeros(columns // 8, rows, dtype=torch.int32))
        module.register_buffer("scales", torch.ones(1, rows, dtype=torch.float16))
        return module

    return make


def test_quantizers_that_are_not_installed_are_known_by_their_form(
    subtests: pytest.Subtests,
) -> None:
    packages = {
        "gptqmodel": _packed_in("gptqmodel.nn_modules.qlinear.torch"),
        "auto_gptq": _packed_in("auto_gptq.nn_modules.qlinear.qlinear_cuda"),
        "awq": _packed_in("awq.modules.linear.gemm"),
        "4 bits": _four_bits,
        "8 bits": _eight_bits,
        "8 bits, on the CPU": _before_it_moves,
    }
    for name, make in packages.items():
        with subtests.test(name):
            model = tiny_model()
            mlp = model.model.layers[1].mlp
            mlp.down_proj = make(mlp.down_proj)
            with pytest.raises(
                ModelError, match=r"is quantized: `model\.layers\.1\.mlp\.down_proj"
            ):
                EDITORS["ROME"].from_model(model, tiny_tokenizer(), layers=[0])


def test_plain_weights_of_every_number_format_are_taken() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        check_weights(tiny_model().to(dtype))


def padded() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def test_a_pad_token_beyond_the_embedding_is_refused_and_mended(
    subtests: pytest.Subtests,
) -> None:
    model, tokens = tiny_model(), PromptTokenizer(padded())
    refused = r"pad token '\[PAD\]' has the id 424, but the embedding .* has 424 rows.*resize"
    prompt = tiny_requests(1)[0].prompt
    for name, cls in {**EDITORS, **LEARNERS}.items():
        settings = {"checkpoint": "none"} if name == "TrainedEditor" else quick(cls)
        with subtests.test(name), pytest.raises(ModelError, match=refused):
            cls.from_model(model, padded(), **settings)
    asked: dict[str, Callable[[], Any]] = {
        "continuations": lambda: continuations(model, tokens, [prompt]),
        "score_targets": lambda: score_targets(model, tokens, [([5, 6], [7])]),
        "perplexity": lambda: perplexity(model, tokens, prompt * 5),
    }
    for name, ask in asked.items():
        with subtests.test(name), pytest.raises(ModelError, match=refused):
            ask()
    # Each of the two ways that the error names.
    other = padded()
    other.pad_token = other.eos_token
    ROME.from_model(model, other, **quick(ROME)).edit(tiny_requests(2))
    model.resize_token_embeddings(len(padded()))
    ROME.from_model(model, padded(), **quick(ROME)).edit(tiny_requests(2))


def test_words_beyond_the_embedding_are_refused_by_name() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.add_tokens(["<flibber>"])
    tokens = PromptTokenizer(tokenizer)
    request = EditRequest("The capital of {} is", "Velmora", "<flibber>")
    refused = "token '<flibber>' has the id 424"
    with pytest.raises(RequestError, match=refused):
        ROME.from_model(model, tokenizer, **quick(ROME)).edit(request)
    with pytest.raises(RequestError, match=refused):
        continuations(model, tokens, ["The <flibber> is"])
    with pytest.raises(RequestError, match=refused):
        score_targets(model, tokens, [([5], [424])])
    with pytest.raises(RequestError, match=refused):
        perplexity(model, tokens, "The <flibber> is here.")
    with pytest.raises(RequestError, match=refused):
        trace_facts(
            model, tokens, [EditRequest("The capital of {} <flibber> is", "Velmora", "Dorin")],
            deviation=1.0,
        )  # fmt: skip
