# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Side effects of a run against the same asked by hand, and capabilities by lm-eval."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from torch import nn

from lightning_edit import EditDataModule, Evaluator, FineTune, Fluency, SideEffects
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.prose import perplexity, read_prose
from lightning_edit.evaluation.side_effects import answered, capabilities, fluency
from lightning_edit.functional import contains_answer, ngram_entropy, ngram_fluency, token_f1
from tests.callbacks.own_task import write_own_task
from tests.modules.helpers import bare_trainer


def fit(folder: Path, effects: SideEffects, n: int = 2) -> FineTune:
    editor = FineTune.from_model(*trained_tiny_model(), layers=[2], steps=8, lr=1e-2)
    trainer = bare_trainer(max_epochs=1, callbacks=[effects], default_root_dir=folder)
    trainer.fit(editor, datamodule=EditDataModule(requests=tiny_requests(n)))
    assert {f"side_effects/{name}" for name in effects.rows} <= set(trainer.callback_metrics)
    return editor


def test_before_and_after_are_those_of_the_models(tmp_path: Path) -> None:
    effects = SideEffects(length=6, dirpath=str(tmp_path))
    editor = fit(tmp_path, effects)
    unedited, tokenizer = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    prose = read_prose()
    before, after = effects.rows["perplexity"]
    assert before == pytest.approx(perplexity(unedited, tokens, prose))
    assert after == pytest.approx(perplexity(editor.model, tokens, prose))
    assert before != after
    prompts = [request.prompt for request in tiny_requests(2)]
    assert effects.rows["fluency"][1] == pytest.approx(
        fluency(editor.model, tokens, prompts, length=6)
    )
    # The unedited model gives none of the new answers, however it is asked.
    assert effects.rows["after_prefix"][0] == effects.rows["after_denial"][0] == 0
    written = json.loads((tmp_path / "side_effects.json").read_text(encoding="utf-8"))
    assert list(written) == ["perplexity", "fluency", "after_prefix", "after_denial"]
    assert written["fluency"]["after"] == effects.rows["fluency"][1]


def test_an_answer_behind_a_template_is_found_by_the_evaluator_too() -> None:
    model, tokenizer = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    old = [request.reversed() for request in tiny_requests(4)]
    scores = Evaluator(model, tokens, readings=["autoregressive"]).evaluate(old)
    hits = [p.autoregressive for p in scores.probes if p.metric == "reliability"]
    assert answered(model, tokens, old, ["{}"]) == sum(map(bool, hits)) / len(hits)


def test_fluency_is_the_mean_entropy_of_texts_of_one_length() -> None:
    model, tokenizer = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    prompts = [request.prompt for request in tiny_requests(3)]
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        text = model.generate(**ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        # Of eight tokens the largest entropies are those of seven bigrams and six trigrams.
        largest = (2 / 3 * math.log2(7) + 4 / 3 * math.log2(6)) / 2
        found.append(ngram_entropy(text[0, ids.input_ids.shape[1] :].tolist()) / largest)
    assert fluency(model, tokens, prompts, length=8) == pytest.approx(sum(found) / 3)


def test_the_metric_leaves_out_what_is_too_short_and_merges() -> None:
    words = list("abcde")
    metric = Fluency()
    assert math.isnan(float(Fluency().compute()))
    metric.update([words, ["a", "b"]])
    other = Fluency()
    other.update([["a"] * 5])
    metric.merge_state(other)
    assert (float(metric.compute()), metric.count()) == (0.5, 2)
    assert ngram_fluency(list("ababab")) == pytest.approx(
        ngram_entropy(list("ababab")) / ((2 / 3 * math.log2(5) + 4 / 3 * 2) / 2)
    )
    assert math.isnan(ngram_fluency(["a", "b", "c"]))
    with pytest.raises(TypeError, match="Split it first"):
        metric.update(["a b c"])


def test_contains_and_token_f1_are_readings_of_answers() -> None:
    model, tokenizer = trained_tiny_model()
    evaluator = Evaluator(
        model, PromptTokenizer(tokenizer), readings=["autoregressive", "contains", "token_f1"]
    )
    probes = evaluator.evaluate([request.reversed() for request in tiny_requests(2)]).probes
    for probe in probes:
        if probe.metric == "locality":
            assert (probe.contains, probe.token_f1) == (None, None)
        else:
            assert probe.contains == contains_answer(probe.text, probe.answers)
            assert probe.token_f1 == token_f1(probe.text, probe.answers)
    assert any(probe.contains for probe in probes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefixes": ["Nothing."]}, "`prefixes` are expected to hold {} for the prompt"),
        ({"denials": ["No!"]}, "`denials` are expected to hold {} for the prompt"),
        ({"length": -1}, "`length` is expected to be at least 0"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SideEffects(**settings)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # those of lm-eval and what it imports
def test_lm_eval_measures_a_task_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    facts = tiny_requests(4)
    write_own_task(tmp_path, facts)
    model, tokenizer = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    found = capabilities(model, tokens, ["own_facts"], include_path=str(tmp_path))
    assert found == {"own_facts/acc": 1.0}
    assert isinstance(model, nn.Module)
    # Two facts are edited, and the task sees it.
    editor = FineTune.from_model(model, tokenizer, layers=[2], steps=8, lr=1e-2)
    with editor.edit(facts[:2]).applied(model):
        edited = capabilities(model, tokens, ["own_facts"], include_path=str(tmp_path))
    assert edited["own_facts/acc"] < 1.0
