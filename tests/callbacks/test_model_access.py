# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_edit.callbacks.model_access import find_model, find_tokenizer
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ModelError
from lightning_edit.demos import tiny_model, tiny_tokenizer


def _holder(**parts: Any) -> nn.Module:
    holder = nn.Module()
    for name, part in parts.items():
        setattr(holder, name, part)
    return holder


def test_model_is_found_wherever_it_is() -> None:
    model = tiny_model()
    for holder in (
        _holder(model=model),
        _holder(inner=_holder(deep=nn.ModuleList([nn.Linear(1, 1), model]))),
        _holder(model=model, alias=model),
        _holder(model=_holder(_orig_mod=model)),  # as torch.compile wraps it
        model,
    ):
        assert find_model(holder) is model
    assert find_model(_holder(a=_holder(b=model), c=tiny_model()), "a.b") is model
    assert find_model(_holder(a=_holder(b=model), c=tiny_model()), "a") is model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_model_beneath_peft_is_found() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert find_model(_holder(net=peft.get_peft_model(model, config))) is model


def test_missing_and_ambiguous_models() -> None:
    with pytest.raises(ModelError, match="Module holds no Hugging Face model"):
        find_model(_holder(layer=nn.Linear(1, 1)))
    with pytest.raises(ModelError, match=r"2 Hugging Face models: `a\.x`, `b`\. Name the one"):
        find_model(_holder(a=_holder(x=tiny_model()), b=tiny_model()))
    with pytest.raises(ModelError, match=r"`model_attribute` is 'c.x'.* Modules in it: a, b"):
        find_model(_holder(a=nn.Linear(1, 1), b=nn.Linear(1, 1)), "c.x")
    with pytest.raises(ModelError, match="`a` of Module holds no Hugging Face model"):
        find_model(_holder(a=nn.Linear(1, 1)), "a")
    with pytest.raises(ModelError, match="`a` of Module holds no Hugging Face model"):
        find_model(_holder(a="text"), "a")


def test_tokenizer_is_found_by_type() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokens = PromptTokenizer(tokenizer, chat_template=False)
    assert find_tokenizer(_holder(model=model), model) is None
    assert find_tokenizer(_holder(t=tokenizer, own=tokens), model) is tokens
    found = find_tokenizer(_holder(anything=tokenizer), model)
    assert found is not None
    assert found.tokenizer is tokenizer
    assert not found.is_encoder_decoder
    t5 = tiny_model("t5")
    found = find_tokenizer(_holder(anything=tokenizer), t5)
    assert found is not None
    assert found.is_encoder_decoder
