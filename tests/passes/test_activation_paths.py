# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of scaled activations in one pass, against the whole model layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.passes import activation_paths
from lightning_edit.passes.activation_paths import ActivationPaths
from tests.zoo import KINDS, LAYERS, build

PROMPT, ANSWER = [5, 9, 17, 30], [11, 12]


def plain(
    tree: ModelTree, prompt: Sequence[int], k: int, token: int, layer: int, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Activation [M] and gradients [S, M] of one layer: a hook, one whole row at a time."""
    model: Any = tree.model
    model.requires_grad_(False)
    projection = tree.mlp_out(layer).module(model)
    if tree.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        decoder = torch.tensor([[start, *ANSWER[:k]]])
        inputs = {"input_ids": torch.tensor([list(prompt)]), "decoder_input_ids": decoder}
        position = k
    else:
        inputs = {"input_ids": torch.tensor([[*prompt, *ANSWER[:k]]])}
        position = len(prompt) + k - 1
    kept: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0].reshape(-1, args[0].shape[-1])[position].detach().clone())

    hook = projection.register_forward_pre_hook(keep)
    model(**inputs, use_cache=False)
    hook.remove()
    gradients = []
    for point in points:
        scaled = (point * kept[0]).requires_grad_()

        def put(_: Any, args: tuple[Tensor, ...], scaled: Tensor = scaled) -> tuple[Tensor, ...]:
            rows = args[0].clone()
            rows.view(-1, rows.shape[-1])[position] = scaled
            return (rows, *args[1:])

        hook = projection.register_forward_pre_hook(put)
        logits = model(**inputs, use_cache=False).logits
        hook.remove()
        probability = torch.softmax(logits[0, position], -1)[token]
        gradients.append(torch.autograd.grad(probability, scaled)[0])
    return kept[0], torch.stack(gradients)


def compare(kind: str, prompt: Sequence[int], points: Tensor, layers: Sequence[int]) -> None:
    tree = ModelTree.of(build(kind))
    paths = ActivationPaths.capture(tree, prompt, ANSWER)
    for k, token in ((0, ANSWER[0]), (2, 40)):
        found = paths.gradients(k, token, layers, points)
        probability = torch.softmax(paths.logits[k], -1)[token]
        assert found.probability == pytest.approx(float(probability), rel=1e-4)
        for i, layer in enumerate(layers):
            activation, gradients = plain(tree, prompt, k, token, layer, points)
            torch.testing.assert_close(found.activations[i], activation, rtol=1e-4, atol=1e-5)
            assert gradients.norm() > 0
            assert (found.gradients[i] - gradients).norm() < 1e-4 * gradients.norm(), (k, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_whole_model(kind: str) -> None:
    compare(kind, PROMPT, torch.linspace(0, 1, 3), range(LAYERS))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("points", [[0.0], [0.0, 0.4], [0.25, 1.0], [1.0]], ids=str)
def test_any_points_will_do(kind: str, points: list[float]) -> None:
    compare(kind, PROMPT, torch.tensor(points), range(LAYERS))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prompt_of_one_token_has_no_prefix(kind: str) -> None:
    compare(kind, [7], torch.linspace(0, 1, 3), range(LAYERS))


def test_some_layers_are_those_of_all() -> None:
    compare("llama", PROMPT, torch.linspace(0, 1, 3), [2])


def test_rows_that_are_too_many_climb_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_paths, "MAX_ROWS", 5)
    compare("llama", PROMPT, torch.linspace(0, 1, 4), range(LAYERS))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Bloom", "Falcon", "Mistral"])
def test_biases_and_windows_are_of_every_row(kind: str, attention: str) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"sliding_window": 3, "num_key_value_heads": 2} if kind == "Mistral" else {}
    if kind == "Bloom":
        sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
        attention = "eager"  # the only one it has
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, alibi=True, initializer_range=0.1, attn_implementation=attention, **sizes
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    tree, points, prompt = ModelTree.of(model), torch.linspace(0, 1, 3), [*PROMPT, 40, 3, 8]
    found = ActivationPaths.capture(tree, prompt).gradients(0, 3, [0, 1], points)
    for layer in (0, 1):
        _, gradients = plain(tree, prompt, 0, 3, layer, points)
        assert (found.gradients[layer] - gradients).norm() < 1e-4 * gradients.norm()


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    flags = [p.requires_grad for p in model.parameters()]
    paths = ActivationPaths.capture(ModelTree.of(model), PROMPT)
    one = paths.gradients(0, 3, [0, 1], torch.linspace(0, 1, 3))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # And the cached keys and values are: a second run finds the same.
    other = paths.gradients(0, 3, [0, 1], torch.linspace(0, 1, 3))
    assert torch.equal(one.gradients, other.gradients)


def test_a_model_that_hands_on_something_else_is_refused() -> None:
    model: Any = build("llama")
    tree = ModelTree.of(model)
    paths = ActivationPaths.capture(tree, PROMPT)

    def whole_rows_alone(_: Any, args: Any, output: Any) -> Any:
        return output + 0.5 * output.roll(1, -1)  # as a state that no cache holds would do

    hook = tree.blocks[1].register_forward_hook(whole_rows_alone)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.* differ by \d+%"):
        paths.gradients(0, 3, [0, 1], torch.linspace(0, 1, 3))
    hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_cannot_be_run_so_is_told() -> None:
    model: Any = build("t5")
    model.get_encoder = None
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration cannot be run .*TypeError"):
        ActivationPaths.capture(ModelTree.of(model), PROMPT)
