# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Causal traces against one plain forward pass a restoration, for every decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_edit import EditRequest, PromptTokenizer
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.tracing import restoration
from lightning_edit.tracing.causal_tracing import (
    POSITIONS,
    FactTrace,
    TracingResult,
    TracingSettings,
    propose_layers,
    subject_deviation,
    trace_facts,
)
from lightning_edit.tracing.heat_map import plot_tracing
from lightning_edit.tracing.restoration import KINDS, CorruptedRun, Kind, Restoration
from tests import zoo

IDS = (20, 21, 22, 23, 24, 25, 26)
SUBJECT = range(2, 4)
SAMPLES = 3
# Where each family keeps what is restored; found by reading the models' code.
PARTS = {
    "llama": ("model.layers", "mlp", "self_attn"),
    "gemma2": ("model.layers", "mlp", "self_attn"),
    "gpt2": ("transformer.h", "mlp", "attn"),
    "gptj": ("transformer.h", "mlp", "attn"),
    "gptneox": ("gpt_neox.layers", "mlp", "attention"),
    "opt": ("model.decoder.layers", "fc2", "self_attn"),
    "falcon": ("transformer.h", "mlp.dense_4h_to_h", "self_attention"),
    "phi": ("model.layers", "mlp", "self_attn"),
}


def covered(kind: Kind, layer: int, window: int) -> range:
    """Layers around one, with an even window reaching one further down than up."""
    if kind == "hidden":
        return range(layer, layer + 1)
    return range(max(0, layer - window // 2), min(zoo.LAYERS, layer - (-window // 2)))


def plain_scores(
    model: Any,
    modules: Sequence[nn.Module],
    token: int | None,
    noise: Tensor,
    ids: Sequence[int] = IDS,
    subject: range = SUBJECT,
) -> Tensor:
    """Next-token probabilities [1 + S, V]: row 0 clean, the others with noise and restored."""
    rows = 1 + noise.shape[0]

    def corrupt(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, subject.start : subject.stop] += noise
        return output

    def restore(_: nn.Module, __: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        states = whole.reshape(rows, len(ids), -1).clone()
        states[1:, token] = states[0, token]
        states = states.reshape(whole.shape)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hooks = [model.get_input_embeddings().register_forward_hook(corrupt)]
    hooks += [module.register_forward_hook(restore) for module in modules]
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(ids)] * rows), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    probabilities: Tensor = logits[:, -1].softmax(-1)
    return probabilities


@pytest.mark.parametrize("kind", PARTS)
def test_scores_are_those_of_whole_forward_passes(kind: str) -> None:
    model = zoo.build(kind)
    run, noise = corrupted(model)
    run.check()
    probabilities = plain_scores(model, [], None, noise)
    assert run.answer == int(probabilities[0].argmax())
    assert run.high == pytest.approx(float(probabilities[0].max()), abs=1e-6)
    assert run.low == pytest.approx(float(probabilities[1:, run.answer].mean()), abs=1e-6)
    blocks, mlp, attention = PARTS[kind]
    names = {"hidden": "", "mlp": f".{mlp}", "attention": f".{attention}"}
    window = 2
    wanted, found = [], []
    for token in range(SUBJECT.start, len(IDS)):
        points: list[Restoration] = []
        for part in KINDS:
            for layer in range(zoo.LAYERS):
                layers = covered(part, layer, window)
                points.append(Restoration(part, layers.start, layers.stop))
                modules = [model.get_submodule(f"{blocks}.{i}{names[part]}") for i in layers]
                scores = plain_scores(model, modules, token, noise)[1:, run.answer]
                wanted.append(float(scores.mean()))
        found += run.restore(token, points).tolist()
    # The restorations have to differ for the comparison to say anything.
    assert max(wanted) - min(wanted) > 1e-4
    assert found == pytest.approx(wanted, abs=1e-6)


def corrupted(model: Any, scale: float = 3.0) -> tuple[CorruptedRun, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(SAMPLES, len(SUBJECT), 32, generator=generator)
    noise *= scale * model.get_input_embeddings().weight.detach().std()
    return CorruptedRun(ModelTree.of(model), IDS, SUBJECT, noise), noise


@pytest.mark.parametrize("kind", sorted({*zoo.DECODERS} - {*PARTS}))
def test_other_decoders_pass_the_check(kind: str) -> None:
    model = zoo.build(kind)
    run, noise = corrupted(model)
    run.check()
    blocks = ModelTree.of(model).blocks
    wanted = plain_scores(model, [blocks[1]], 3, noise)[1:, run.answer].mean()
    found = run.restore(3, [Restoration("hidden", 1, 2)])
    torch.testing.assert_close(found, wanted[None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["Bloom", "Mpt"])
def test_biases_of_rows_and_heads_follow_the_rows(name: str) -> None:
    import transformers

    sizes: dict[str, dict[str, Any]] = {
        "Bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2},
        "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=300, **sizes[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    run, noise = corrupted(model, scale=20.0)
    run.check()
    down = {"Bloom": "dense_4h_to_h", "Mpt": "down_proj"}[name]
    projections = [m for n, m in model.named_modules() if n.endswith(f".{down}")]
    wanted = [plain_scores(model, projections[:2], t, noise)[1:, run.answer].mean() for t in (2, 5)]
    found = [run.restore(t, [Restoration("mlp", 0, 2)]) for t in (2, 5)]
    assert abs(float(wanted[0]) - run.low) > 1e-6
    torch.testing.assert_close(torch.cat(found), torch.stack(wanted), rtol=0, atol=1e-7)


def test_what_no_restoration_can_change_is_the_corrupted_run() -> None:
    run, _ = corrupted(zoo.build("llama"))
    last = zoo.LAYERS - 1
    found = run.restore(3, [Restoration("hidden", last, last + 1), Restoration("mlp", 0, 0)])
    assert found.tolist() == pytest.approx([run.low, run.low], abs=1e-7)
    all_clean = run.restore(len(IDS) - 1, [Restoration("hidden", last, last + 1)])
    assert float(all_clean) == pytest.approx(run.high, abs=1e-6)


def test_models_that_cannot_be_run_by_blocks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is none"):
        corrupted(tiny_model("t5"))
    with pytest.raises(ModelError, match="MixtralForCausalLM has not in every layer"):
        corrupted(zoo.build("mixtral"))
    model = zoo.build("llama")
    run, _ = corrupted(model)
    block = ModelTree.of(model).blocks[1]
    # Such as a model that adds something between its blocks.
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + 5.0,))
    try:
        logits = run._logits
        monkeypatch.setattr(run, "_logits", lambda state: logits(state - 5.0) * 1.5)
        with pytest.raises(ModelError, match=r"differ by \d+% from the model's"):
            run.check()
    finally:
        handle.remove()
    monkeypatch.setattr(block, "forward", lambda *_, **__: "no tensor")
    with pytest.raises(ModelError, match="cannot be run on their own"):
        corrupted(model)


@cache
def traced(n: int = 3, window: int = 2, max_rows: int = 1024) -> TracingResult:
    model, tokenizer = trained_tiny_model()
    settings = TracingSettings(window=window, max_rows=max_rows)
    return trace_facts(model, PromptTokenizer(tokenizer), tiny_requests(n), settings)


def test_facts_are_traced_as_the_paper_has_it() -> None:
    model, tokenizer = trained_tiny_model()
    result = traced()
    [fact] = [f for f in result.facts if f.id == tiny_requests(2)[1].id]
    assert (fact.prompt, fact.answer) == ("People in Velmora speak", " Velm")
    assert "".join(fact.tokens) == fact.prompt
    start, stop = fact.subject_range
    assert "".join(fact.tokens[start:stop]) == " Velmora"
    assert fact.high > 0.9
    assert fact.low < 0.5
    assert {kind: tuple(s.shape) for kind, s in fact.scores.items()} == dict.fromkeys(
        get_args(Kind), (len(fact.tokens), 4)
    )
    # By hand: the noise of the default seed, scaled by the spread of the subjects' embeddings.
    subjects = [request.subject for request in tiny_requests(3)]
    rows = [tokenizer(text)["input_ids"] for text in subjects]
    entries = model.get_input_embeddings().weight.detach()[[i for row in rows for i in row]]
    assert result.deviation == pytest.approx(float(entries.std()))
    noise = torch.randn(10, stop - start, 32, generator=torch.Generator().manual_seed(0))
    ids = tokenizer(fact.prompt)["input_ids"]
    answer = tokenizer(" Velmic")["input_ids"][0]
    layers = model.model.layers
    for kind, modules in (("hidden", [layers[1]]), ("mlp", [layers[0].mlp, layers[1].mlp])):
        scores = plain_scores(
            model, modules, start, 3 * result.deviation * noise, ids, range(start, stop)
        )
        found = float(fact.scores[kind][start, 1])  # type: ignore[index]
        assert found == pytest.approx(float(scores[1:, answer].mean()), abs=1e-5)
    # The last hidden state of the last token is the clean one, and before the subject all is.
    assert float(fact.scores["hidden"][-1, -1]) == pytest.approx(fact.high, abs=1e-5)
    assert fact.scores["attention"][:start].eq(fact.low).all()


def test_small_batches_give_the_same() -> None:
    for few, many in zip(traced(max_rows=20).facts, traced().facts, strict=True):
        for kind in KINDS:
            torch.testing.assert_close(few.scores[kind], many.scores[kind], rtol=0, atol=1e-6)


def test_noise_and_its_size_can_be_given() -> None:
    model, tokenizer = trained_tiny_model()
    tokens, requests = PromptTokenizer(tokenizer), tiny_requests(1)
    noise = torch.zeros(2, 4, 32)
    [still] = trace_facts(model, tokens, requests, noise=noise).facts
    assert still.low == pytest.approx(still.high, abs=1e-6)
    noise = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(3))
    [half] = trace_facts(
        model, tokens, requests, TracingSettings(noise_factor=1.5), deviation=0.2, noise=noise
    ).facts
    [whole] = trace_facts(
        model, tokens, requests, TracingSettings(noise_factor=3.0), deviation=0.1, noise=noise
    ).facts
    assert half.low == pytest.approx(whole.low, abs=1e-6)
    assert half.low != pytest.approx(half.high, abs=1e-3)


def test_facts_that_the_model_does_not_know_are_counted() -> None:
    model, tokenizer = trained_tiny_model()
    known, other, own = tiny_requests(3)
    wrong = EditRequest(known.prompt, known.subject, "Dorin", "Kettleby", id="wrong")
    open_end = EditRequest(own.prompt, own.subject, own.target_new, id="own")
    result = trace_facts(model, PromptTokenizer(tokenizer), [wrong, other, open_end])
    assert result.unknown == ["wrong"]
    assert [fact.id for fact in result.facts] == [other.id, "own"]
    first = tokenizer.tokenize(f" {own.target_old}")[0]
    assert result.facts[1].answer == tokenizer.convert_tokens_to_string([first])
    nothing = trace_facts(model, PromptTokenizer(tokenizer), [wrong])
    assert (nothing.facts, nothing.unknown) == ([], ["wrong"])
    assert nothing.to_dict()["average_indirect_effect"] == {}
    for refused in (nothing.average, lambda _: propose_layers(nothing)):
        with pytest.raises(EditError, match="knows no old answer"):
            refused("mlp")


def fact_of(subject: range, scores_TL: Tensor, low: float) -> FactTrace:
    words = tuple(f" {i}" for i in range(len(scores_TL)))
    scores: dict[Kind, Tensor] = dict.fromkeys(KINDS, scores_TL)
    return FactTrace("f", "p", "s", " a", words, (subject.start, subject.stop), 1.0, low, scores)


def test_averages_are_over_facts_and_classes_of_tokens() -> None:
    long = fact_of(range(1, 5), torch.arange(8.0)[:, None].expand(8, 2), low=1.0)
    short = fact_of(range(0, 1), torch.tensor([[4.0, 5.0], [6.0, 7.0]]), low=2.0)
    average = TracingResult([long, short], [], 1.0).average("mlp")
    # Effects of the long one: -1 … 6. The short one's only subject token is first and last.
    wanted = [
        [(0 + 2) / 2, (0 + 3) / 2],  # token 1; token 0
        [1.5, 1.5],  # tokens 2 and 3
        [(3 + 2) / 2, (3 + 3) / 2],  # token 4; token 0
        [(4 + 4) / 2, (4 + 5) / 2],  # token 5; token 1
        [5.0, 5.0],  # token 6
        [(6 + 4) / 2, (6 + 5) / 2],  # token 7; token 1
    ]
    torch.testing.assert_close(average, torch.tensor(wanted))
    ended = fact_of(range(1, 2), torch.tensor([[0.0], [3.0]]), low=0.0)
    nothing = TracingResult([ended], [], 1.0).average("hidden").squeeze(1)
    torch.testing.assert_close(
        nothing, torch.tensor([3, torch.nan, 3, torch.nan, torch.nan, 3]), equal_nan=True
    )
    row = TracingResult([ended], [], 1.0).to_dict()["average_indirect_effect"]["hidden"]
    assert row["middle subject tokens"] == [None]
    assert row["last subject token"] == [3.0]
    assert list(row) == list(POSITIONS)


@pytest.mark.parametrize(
    ("peak", "count", "layers"),
    [(3, 1, [3]), (3, 3, [2, 3, 4]), (3, 4, [1, 2, 3, 4]), (0, 3, [0, 1, 2]), (5, 3, [3, 4, 5])],
)
def test_layers_are_proposed_around_the_peak(peak: int, count: int, layers: list[int]) -> None:
    scores_TL = torch.zeros(3, 6)
    scores_TL[1, peak] = 0.5
    scores_TL[2, 1] = 0.9  # larger, but not at the subject
    result = TracingResult([fact_of(range(0, 2), scores_TL, low=0.0)], [], 1.0)
    assert propose_layers(result, count) == layers
    with pytest.raises(ValueError, match="`count` is expected to be from 1 to 6, but got 7"):
        propose_layers(result, 7)


def test_no_layers_are_proposed_where_mlps_do_not_hold_the_fact() -> None:
    scores_TL = torch.zeros(3, 6)
    scores_TL[2, 1] = 0.9  # not at the subject
    for peak, low, expected in ((0.05, 0.0, []), (0.15, 0.0, [3]), (-0.2, 0.0, []), (1.0, 1.0, [])):
        scores_TL[1] = low - 0.5
        scores_TL[1, 3] = low + peak
        result = TracingResult([fact_of(range(0, 2), scores_TL, low=low)], [], 1.0)
        assert propose_layers(result, 1) == expected


def test_settings_are_checked_and_windows_end_with_the_model() -> None:
    with pytest.raises(ValueError, match="`samples` is expected to be more than 0, but got 0"):
        TracingSettings(samples=0)
    for window in (1, 2, 3, 10):
        settings = TracingSettings(window=window)
        for layer in range(zoo.LAYERS):
            for kind in KINDS:
                found = settings.restoration(kind, layer, zoo.LAYERS)
                assert range(found.start, found.stop) == covered(kind, layer, window)


def test_the_spread_is_that_of_the_subjects_tokens() -> None:
    model = tiny_model()
    tree, tokens = ModelTree.of(model), PromptTokenizer(tiny_tokenizer())
    ids = tokens.tokenizer(" Velmora")["input_ids"] + tokens.tokenizer("Dorin")["input_ids"]
    wanted = model.get_input_embeddings().weight.detach()[ids].std()
    found = subject_deviation(tree, tokens, [" Velmora", "Dorin"])
    assert found == pytest.approx(float(wanted))


def test_blocks_before_the_restored_layer_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = corrupted(zoo.build("llama"))
    rows: dict[int, int] = {}
    block = CorruptedRun._block

    def counted(self: CorruptedRun, i: int, t: int, state: Tensor, *rest: Any) -> Tensor:
        rows[i] = state.shape[0] * state.shape[1]
        return block(self, i, t, state, *rest)

    monkeypatch.setattr(restoration.CorruptedRun, "_block", counted)
    run.restore(4, [Restoration("hidden", 1, 2), Restoration("mlp", 1, 2)])
    # From the restored token on, and one row of copies more above layer 1.
    assert rows == {1: SAMPLES * 3, 2: 2 * SAMPLES * 3}


def test_windows_that_start_together_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = corrupted(zoo.build("llama"))
    windows = [Restoration("mlp", 0, stop) for stop in (1, 3, 2, 3)]
    alone = [float(run.restore(6, [window])) for window in windows]
    rows: list[int] = []
    block = CorruptedRun._block

    def counted(self: CorruptedRun, i: int, t: int, state: Tensor, *rest: Any) -> Tensor:
        rows.append(state.shape[0] // SAMPLES)
        return block(self, i, t, state, *rest)

    monkeypatch.setattr(restoration.CorruptedRun, "_block", counted)
    assert run.restore(6, windows).tolist() == pytest.approx(alone, abs=1e-7)
    assert len({round(score, 7) for score in alone}) == 3
    assert rows == [1, 2, 3]


def test_mixed_precision_is_that_of_the_caller() -> None:
    model, tokenizer = trained_tiny_model()
    exact = traced(1).facts[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        settings = TracingSettings(window=2)
        tokens = PromptTokenizer(tokenizer)
        rounded = trace_facts(model, tokens, tiny_requests(1), settings).facts[0]
    assert rounded.high != exact.high
    for kind in KINDS:
        torch.testing.assert_close(rounded.scores[kind], exact.scores[kind], rtol=0, atol=0.05)


def test_heat_maps_show_tokens_with_the_subject_starred() -> None:
    pytest.importorskip("matplotlib")
    result = traced()
    figure = plot_tracing(result, facts=2)
    texts = [grid.get_suptitle() for grid in figure.subfigs]
    assert texts[0] == "Average indirect effect over 3 facts, in probability"
    assert texts[1].startswith("“The capital of Velmora is” → Dorin")
    panels = [axis for axis in figure.subfigs[1].axes if axis.get_title().startswith("Restored")]
    assert [panel.get_title() for panel in panels] == [
        "Restored: one hidden state",
        "Restored: MLP outputs, window of 2",
        "Restored: attention outputs, window of 2",
    ]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == ["The", "capital", "of", "Velmora*", "is"]
    drawn: Any = panels[1].collections[0].get_array()
    scores = result.facts[0].scores["mlp"].numpy()
    assert np.array_equal(drawn.reshape(scores.shape), scores)
