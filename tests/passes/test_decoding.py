# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What is written is by settings of our own, whatever the model's generation configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.locator import ModelTree
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.evaluation.scoring import continuations
from lightning_edit.modules.locate_then_edit.second_moment import second_moments
from lightning_edit.passes import sampling
from lightning_edit.passes.decoding import end_ids
from lightning_edit.passes.sampling import sample_templates, sample_text_ids

ORDINARY = list(range(100, 300))
# A value of each field of a generation configuration that would change or break what is written.
# Whoever meets a field that is not here: find out what it does, and add it.
HOSTILE: dict[str, Any] = {
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bad_words_ids": [[i] for i in ORDINARY],
    "begin_suppress_tokens": ORDINARY,
    "bos_token_id": 7,
    "cache_config": {"backend": "none"},
    "cache_implementation": "static",
    "compile_config": {"mode": "none"},
    "constraints": ["none"],
    "continuous_batching_config": {"none": 1},
    "decoder_start_token_id": 9,
    "disable_compile": True,
    "diversity_penalty": 3.0,
    "do_sample": True,
    "dola_layers": "low",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 5.0,
    "eos_token_id": ORDINARY,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "exponential_decay_length_penalty": (0, 50.0),
    "force_words_ids": [[101]],
    "forced_bos_token_id": 101,
    "forced_eos_token_id": 101,
    "guidance_scale": 3.0,
    "is_assistant": True,
    "length_penalty": -5.0,
    "low_memory": True,
    "max_cache_len": 3,
    "max_length": 1,
    "max_matching_ngram_size": 1,
    "max_new_tokens": 1,
    "max_time": 0.0,
    "min_length": 40,
    "min_new_tokens": 40,
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 3,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 100,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 1,
    "prompt_lookup_num_tokens": 2,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 9.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[i], 30.0] for i in ORDINARY],
    "speculation_type": "dflash",
    "stop_strings": ["a", "e"],
    "suppress_tokens": ORDINARY,
    "target_lookbehind": 3,
    "temperature": 9.0,
    "token_healing": True,
    "top_h": 0.1,
    "top_k": 1,
    "top_p": 0.01,
    "typical_p": 0.1,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": {"bias": 9.0},
}


def test_each_field_of_a_generation_configuration_is_known_here() -> None:
    """A field that a new release has is to be thought about."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - {"transformers_version"} <= HOSTILE.keys()


def written(model: Any, tokens: PromptTokenizer) -> list[Any]:
    prompts = [request.prompt for request in tiny_requests(2)]
    found: list[Any] = [continuations(model, tokens, prompts, max_new_tokens=8)]
    found.append(sample_text_ids(model, tokens, 16, 0).tolist())
    if not tokens.is_encoder_decoder:
        found.append(sample_templates(model, tokens, 0, 1, (5,)))
    return found


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_no_field_has_a_part_in_what_is_written(
    kind: Any, subtests: pytest.Subtests, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of 8 tokens show each field as well as those of 64.
    short = {"max_new_tokens": 7, "min_new_tokens": 7}
    monkeypatch.setattr(sampling, "ROWS", {**sampling.ROWS, **short})
    model: Any = trained_tiny_model()[0] if kind == "llama" else tiny_model(kind)
    tokens = PromptTokenizer(tiny_tokenizer(), is_encoder_decoder=kind == "t5")
    wanted, own = written(model, tokens), model.generation_config
    groups = [{name: value} for name, value in HOSTILE.items()]
    for fields in [*groups, HOSTILE]:
        with subtests.test(" ".join(fields) if len(fields) == 1 else "all"):
            model.generation_config = GenerationConfig()
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
                setattr(model.generation_config, name, getattr(own, name))
            for name, value in fields.items():
                setattr(model.generation_config, name, value)
            given = model.generation_config
            before = dict(vars(given))
            assert written(model, tokens) == wanted
            assert model.generation_config is given
            assert vars(given) == before


def test_it_is_given_back_when_the_model_fails() -> None:
    model, tokenizer = trained_tiny_model()
    given = model.generation_config

    def fail(*_: Any) -> None:
        raise OSError("in the middle")

    with model.model.layers[1].register_forward_hook(fail), pytest.raises(OSError, match="middle"):
        continuations(model, PromptTokenizer(tokenizer), ["The capital of Velmora is"])
    assert model.generation_config is given


def test_further_special_tokens_end_a_text_and_words_do_not() -> None:
    model, tokenizer = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    assert end_ids(model, tokens) == [tokens.eos_id]
    model.generation_config.eos_token_id = [150, tokens.pad_id]
    assert end_ids(model, tokens) == [tokens.eos_id, tokens.pad_id]


def test_statistics_are_kept_under_all_that_made_them(tmp_path: Path) -> None:
    model: Any = trained_tiny_model()[0]
    tokens = PromptTokenizer(tiny_tokenizer())

    def files(**settings: Any) -> set[str]:
        arguments = {"model_hash": "abc", "tokens_per_dimension": 1, **settings}
        second_moments(ModelTree.of(model), tokens, [0], cache_dir=tmp_path, **arguments)
        return {file.name for file in (tmp_path / "second_moments").iterdir()}

    first = files()
    # What has no part in it is no part of the key.
    model.generation_config.update(temperature=3.0, suppress_tokens=ORDINARY)
    model.config._name_or_path = "elsewhere"
    assert files() == first
    for change in (
        lambda: {"seed": 1},
        lambda: {"tokens_per_dimension": 2},
        lambda: setattr(model.config, "rms_norm_eps", 1e-3),
        lambda: setattr(model.generation_config, "eos_token_id", [1, 0]),
        lambda: tokens.tokenizer.add_special_tokens(
            {"additional_special_tokens": [tokens.tokenizer.convert_ids_to_tokens(200)]}
        ),
    ):
        settings = change()
        before = len(files())
        found = files(**settings) if isinstance(settings, dict) else files()
        assert len(found) >= before
    assert len(found) == 6


def test_rows_begin_with_tokens_that_the_model_knows() -> None:
    model, tokenizer = trained_tiny_model()
    wanted = sample_text_ids(model, PromptTokenizer(tokenizer), 64, 0)
    tokenizer.add_tokens([f"<new {i}>" for i in range(400)])
    found = sample_text_ids(model, PromptTokenizer(tokenizer), 64, 0)
    assert torch.equal(found, wanted)
