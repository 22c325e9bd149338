# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the evaluator makes of probes: by hand, before and after a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.evaluator import Evaluator, ScoredProbe, probe_score, probe_scores
from lightning_edit.metrics import edit_metrics


@pytest.fixture
def evaluator() -> Evaluator:
    model, tokenizer = trained_tiny_model()
    return Evaluator(model, PromptTokenizer(tokenizer))


def values(evaluation: Any) -> dict[str, float]:
    metrics = edit_metrics(likelihoods=True)
    evaluation.update(metrics)
    return {key: float(value) for key, value in metrics.compute().items()}


def test_unedited_model_is_perfectly_local_and_unreliable(evaluator: Evaluator) -> None:
    found = values(evaluator.evaluate(tiny_requests(6)))
    assert found["reliability/autoregressive"] == 0.0
    assert found["locality/autoregressive"] == 1.0
    assert found["locality/teacher_forced"] == 1.0
    assert found["efficacy_success/teacher_forced"] == 0.0
    assert found["neighborhood_success/teacher_forced"] == 1.0


def test_true_facts_are_reliable(evaluator: Evaluator) -> None:
    requests = [r.reversed() for r in tiny_requests(6)]
    found = values(evaluator.evaluate(requests))
    assert found["reliability/autoregressive"] == 1.0
    assert found["reliability/teacher_forced"] == 1.0
    assert found["reliability/teacher_forced_strict"] == 1.0
    assert found["efficacy_success/teacher_forced"] == 1.0


def test_divergence_is_zero_on_the_same_model_and_positive_on_another(evaluator: Evaluator) -> None:
    requests = tiny_requests(3)
    before = evaluator.evaluate(requests)
    assert before.mean("locality/kl")[0] == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for parameter in evaluator.model.model.layers[0].parameters():
            parameter.mul_(0.5)
    after = evaluator.evaluate(requests, before.baseline)
    assert after.mean("locality/kl")[0] > 0.01
    assert values(after)["locality/autoregressive"] < 1.0


def test_unedited_model_agrees_with_itself_however_its_text_begins(evaluator: Evaluator) -> None:
    said = {
        "The capital of Velmora is Dorin": ".",  # no space before it
        "The capital of Velmora is": "Dorin",
    }
    probes = tuple(Probe(prompt, answer, "unrelated") for prompt, answer in said.items())
    request = EditRequest("The capital of Ostrane is", "Ostrane", "red", locality=probes)
    found = evaluator.evaluate([request])
    for prompt, answer in said.items():
        assert found.baseline.texts[prompt].startswith(answer)
    assert [p.teacher_forced for p in found.probes if p.metric == "locality"] == [1.0] * 2


def test_requests_apart_equal_requests_together(evaluator: Evaluator) -> None:
    requests = tiny_requests(5)
    together = evaluator.evaluate(requests).probes
    apart = [p for request in requests for p in evaluator.evaluate([request]).probes]
    for a, b in zip(together, apart, strict=True):
        assert (a.prompt, a.text, a.teacher_forced, a.autoregressive) == (
            b.prompt,
            b.text,
            b.teacher_forced,
            b.autoregressive,
        )


def test_readings_can_be_left_out(evaluator: Evaluator) -> None:
    only = Evaluator(evaluator.model, evaluator.tokens, readings=["teacher_forced"])
    probes = only.evaluate(tiny_requests(2)).probes
    assert all(p.autoregressive is None and p.text == "" for p in probes)
    assert all(p.teacher_forced is not None for p in probes)


def test_no_requests_is_no_accident(evaluator: Evaluator) -> None:
    assert evaluator.evaluate([]).probes == []
    bare = EditRequest("The capital of Velmora is", "Velmora", "red")
    found = values(evaluator.evaluate([bare]))
    assert found["locality/teacher_forced"] != found["locality/teacher_forced"]  # no probes: nan


def test_scores_go_to_the_metrics_they_belong_to() -> None:
    probe = ScoredProbe(
        "a",
        "portability",
        "one_hop",
        "p",
        ("x",),
        teacher_forced=0.5,
        exact=False,
        autoregressive=True,
    )
    assert probe_score(probe, "portability/teacher_forced") == 0.5
    assert probe_score(probe, "portability/one_hop/autoregressive") == 1.0
    assert probe_score(probe, "portability/teacher_forced_strict") == 0.0
    assert probe_score(probe, "portability/inverse/autoregressive") is None
    assert probe_score(probe, "reliability/teacher_forced") is None
    neighbor = ScoredProbe("a", "locality", "neighborhood", "p", ("x",), nll_new=2.0, nll_old=1.0)
    assert probe_score(neighbor, "neighborhood_success/teacher_forced") == 1.0
    unrelated = ScoredProbe("a", "locality", "unrelated", "p", ("x",), nll_new=2.0, nll_old=1.0)
    assert probe_score(unrelated, "neighborhood_success/teacher_forced") is None


def test_a_question_in_several_wordings_counts_once_by_its_best() -> None:
    def probe(request: str, kind: str, hit: bool) -> ScoredProbe:
        about = (request, "portability", kind, "?", ("x",))
        return ScoredProbe(*about, autoregressive=hit)

    probes = [probe("a", "multi_hop", hit) for hit in (False, True, False)]
    probes += [probe("b", "multi_hop", False) for _ in range(3)]
    probes += [probe("b", "single_hop", hit) for hit in (True, False)]
    key = "portability/multi_hop/autoregressive"
    assert sorted(probe_scores(probes, key)) == [0.0, 1.0]
    assert sorted(probe_scores(probes, "portability/autoregressive")) == [0.0, 0.0, 1.0, 1.0]
