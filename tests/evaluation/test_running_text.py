# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a model writes by itself counts as known in both readings, whatever its tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_edit.core.batch import IGNORE_INDEX, PromptTokenizer, pad_rows
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.evaluation.evaluator import Evaluator
from lightning_edit.evaluation.scoring import continuations
from tests.core.families import FACTS, family

NAMES = ("Llama 2", "Mistral", "Gemma", "Llama 3", "Qwen")


def _taught(tokenizer: Any) -> Any:
    """A small model that has read the facts as running text, in the tokenizer's own tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=tokenizer.convert_tokens_to_ids("<s>"),
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    rows = [tokenizer(fact.text + "\n")["input_ids"] for fact in FACTS]
    ids, mask = pad_rows(rows, tokenizer.eos_token_id)
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_both_readings_know_what_the_model_writes(name: str, subtests: pytest.Subtests) -> None:
    tokenizer = family(name)
    model, tokens = _taught(tokenizer), PromptTokenizer(tokenizer)
    evaluator = Evaluator(model, tokens, max_new_tokens=40)
    written = continuations(model, tokens, [fact.prompt for fact in FACTS], max_new_tokens=40)
    assert [said.text for said in written] == [fact.answer for fact in FACTS]
    assert [said.is_spaced for said in written] == [bool(fact.space) for fact in FACTS]
    requests = [
        EditRequest(
            fact.prompt,
            target_new=fact.answer,
            glued=fact.glued,
            rephrases=(fact.prompt,),
            locality=(Probe(fact.prompt, fact.answer, glued=fact.glued),),
            portability=(Probe(fact.prompt, fact.answer, "one_hop", glued=fact.glued),),
        )
        for fact in FACTS
    ]
    for probe in evaluator.evaluate(requests).probes:
        with subtests.test(f"{probe.metric}: {probe.prompt}"):
            assert (probe.exact, probe.teacher_forced, probe.autoregressive) == (True, 1.0, True)


def test_an_answer_glued_to_the_prompt_is_another_than_one_apart() -> None:
    model, tokens = _taught(family("Qwen")), PromptTokenizer(family("Qwen"))
    requests = [
        EditRequest("He grew up in Newc", target_new="astle", glued=glued, id=str(glued))
        for glued in (True, False, None)
    ]
    probes = Evaluator(model, tokens).evaluate(requests).probes
    assert [probe.autoregressive for probe in probes] == [True, False, False]
    assert [probe.exact for probe in probes] == [True, False, False]
