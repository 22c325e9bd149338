# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Running only what an edit can change gives what the whole model gives, for every decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.tail import Tail, split_rows
from lightning_edit.passes.whole_rows import WholeRows, captured
from tests import zoo

# Token ids; the position of the change; a row that begins with it has no prefix at all.
ROWS = ([9, 8, 7, 6, 5], [11, 12], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32])
SPLITS = (3, 0, 5, 2)


def whole_logits(model: Any, layer: int, row: Sequence[int], split: int, change: Tensor) -> Tensor:
    """Logits from the split on, of one unpadded row through the whole model."""

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        shape = whole.shape
        moved = whole.reshape(1, -1, shape[-1]).clone()
        moved[0, split] += change
        moved = moved.reshape(shape)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    hook = ModelTree.of(model).mlp(layer).register_forward_hook(add)
    try:
        logits: Tensor = model(input_ids=torch.tensor([list(row)]), use_cache=False).logits
    finally:
        hook.remove()
    return logits[0, split:]


def assert_like_whole(
    model: Any,
    tail: Tail,
    layer: int,
    change_ND: Tensor,
    rows: Sequence[Sequence[int]],
    splits: Sequence[int],
) -> None:
    with torch.no_grad():
        found = tail.logits(tail.hidden(change_ND[:, None]))
    for n, (row, split) in enumerate(zip(rows, splits, strict=True)):
        with torch.no_grad():
            wanted = whole_logits(model, layer, row, split, change_ND[n])
        torch.testing.assert_close(found[n, : len(row) - split], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("kind", zoo.DECODERS)
def test_logits_are_those_of_the_whole_model(kind: str, layer: int) -> None:
    model = zoo.build(kind)
    tree = ModelTree.of(model)
    tail = Tail.capture(tree, layer, ROWS, SPLITS, pad_id=0)
    change_ND = torch.randn(len(ROWS), model.config.hidden_size)
    # The change has to matter for the comparison to say anything.
    with torch.no_grad():
        moved = whole_logits(model, layer, ROWS[2], SPLITS[2], change_ND[2])
        still = whole_logits(model, layer, ROWS[2], SPLITS[2], torch.zeros(change_ND.shape[1]))
    assert (moved - still).abs().max() > 0.05
    assert_like_whole(model, tail, layer, change_ND, ROWS, SPLITS)
    assert_like_whole(model, tail, layer, torch.zeros_like(change_ND), ROWS, SPLITS)
    # Some rows of the batch, out of order.
    some = torch.tensor([2, 1])
    rows, splits = [ROWS[i] for i in some], [SPLITS[i] for i in some]
    assert_like_whole(model, tail.select(some), layer, change_ND[some], rows, splits)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "gemma2"])
@pytest.mark.parametrize("splits", [(0, 0, 0, 0), (4, 1, 6, 2)], ids=["first", "last"])
def test_splits_at_the_very_ends_of_the_rows(kind: str, splits: tuple[int, ...]) -> None:
    model = zoo.build(kind)
    tail = Tail.capture(ModelTree.of(model), 1, ROWS, splits, pad_id=0)
    change_ND = torch.randn(len(ROWS), model.config.hidden_size)
    assert_like_whole(model, tail, 1, change_ND, ROWS, splits)


@pytest.mark.parametrize("kind", zoo.DECODERS)
def test_only_models_with_a_norm_behind_the_mlp_go_through_the_edited_block(kind: str) -> None:
    tail = Tail.capture(ModelTree.of(zoo.build(kind)), 1, ROWS, SPLITS, pad_id=0)
    assert tail.inside == (kind in ("gemma2", "gemma3"))
    # The blocks above the edited one, and it itself where the change goes through it.
    assert len(tail.calls) == zoo.LAYERS - 2 + tail.inside


@pytest.mark.parametrize("kind", zoo.DECODERS)
def test_keys_and_values_are_what_goes_through_the_projection(kind: str) -> None:
    model = zoo.build(kind)
    tree = ModelTree.of(model)
    tail = Tail.capture(tree, 1, ROWS, SPLITS, pad_id=0)
    site = tree.mlp_out(1)
    for n, (row, split) in enumerate(zip(ROWS, SPLITS, strict=True)):
        seen: list[Tensor] = []

        def record(_: nn.Module, args: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
            # Copies: Falcon adds to the output in place.
            seen += [t.reshape(-1, t.shape[-1]).clone() for t in (args[0], output)]

        hook = site.module(model).register_forward_hook(record)
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
        hook.remove()
        torch.testing.assert_close(tail.keys[n], seen[0][split], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tail.values[n, 0], seen[1][split], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_gradients_are_those_of_the_whole_model(kind: str) -> None:
    model = zoo.build(kind)
    tail = Tail.capture(ModelTree.of(model), 0, ROWS, SPLITS, pad_id=0)
    change = torch.randn(len(ROWS), model.config.hidden_size, requires_grad=True)
    with borrowed(model):
        logits = tail.logits(tail.hidden(change[:, None]))
        (found,) = torch.autograd.grad(logits[0, :2].square().mean(), change)
        whole = whole_logits(model, 0, ROWS[0], SPLITS[0], change[0])
        (wanted,) = torch.autograd.grad(whole.square().mean(), change)
    assert wanted[0].norm() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert not found[1:].any()  # rows do not see each other


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "falcon"])
def test_lower_precision_is_that_of_autocast(kind: str) -> None:
    model = zoo.build(kind)
    tail = Tail.capture(ModelTree.of(model), 1, ROWS, SPLITS, pad_id=0)
    low = tail.lower(torch.bfloat16)
    change = torch.randn(len(ROWS), model.config.hidden_size, requires_grad=True)
    with borrowed(model), sdpa_kernel(SDPBackend.MATH):
        exact = tail.logits(tail.hidden(change[:, None]))
        found = low.logits(low.hidden(change[:, None]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # What nothing is stored for is converted in the pass.
            wanted = tail.logits(tail.hidden(change[:, None]))
        (gradient,) = torch.autograd.grad(found[0, :2].square().mean(), change)
        (whole,) = torch.autograd.grad(exact[0, :2].square().mean(), change)
    assert found.dtype == torch.float32
    # The residual stream stays exact, and the matrices are rounded.
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()
    torch.testing.assert_close(
        found, wanted, rtol=0.02, atol=0.02 * exact.detach().abs().max().item()
    )
    assert (gradient - whole).norm() < 0.1 * whole.norm()
    assert low.select(torch.tensor([1])).matrices is low.matrices
    assert all(p.dtype == torch.float32 for p in model.parameters())


def build(kind: str, **sizes: Any) -> Any:
    """A tiny model of a kind that the zoo does not keep, or keeps in other sizes."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **SIZES | sizes, vocab_size=424, pad_token_id=0, eos_token_id=1, bos_token_id=None
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
ODD: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 3},
    "Gemma2": {"sliding_window": 3, "head_dim": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "Olmo": {},  # norms without weights
    "Olmo2": {},  # norms behind attention and MLP alone
    "Bloom": {"n_layer": 3, "n_head": 4},  # positions by a bias of rows and heads
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},  # of heads alone
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}


@pytest.mark.parametrize("kind", ODD)
def test_models_with_a_habit_of_their_own(kind: str) -> None:
    model = build(kind, **ODD[kind])
    tail = Tail.capture(ModelTree.of(model), 1, ROWS, SPLITS, pad_id=0)
    change_ND = torch.randn(len(ROWS), 32)
    assert_like_whole(model, tail, 1, change_ND, ROWS, SPLITS)
    some = torch.tensor([3, 0])
    rows, splits = [ROWS[i] for i in some], [SPLITS[i] for i in some]
    assert_like_whole(model, tail.select(some), 1, change_ND[some], rows, splits)


def test_the_dense_layers_of_a_mixture_of_experts() -> None:
    model = zoo.build("deepseek")
    tail = Tail.capture(ModelTree.of(model), 0, ROWS, SPLITS, pad_id=0)
    assert_like_whole(model, tail, 0, torch.randn(len(ROWS), 32), ROWS, SPLITS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Lfm2", "differ by .* from the model's"),  # a convolution over positions
        ("Mamba", "cannot be run on their own"),
    ],
)
def test_a_model_that_passes_on_more_than_keys_and_values_is_refused(
    kind: str, message: str
) -> None:
    model = build(kind)
    with pytest.raises(ModelError, match=message) as caught:
        Tail.capture(ModelTree.of(model), 1, ROWS, SPLITS, pad_id=0)
    assert type(model).__name__ in str(caught.value)


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused() -> None:
    model = zoo.build("llama")

    def scale(_: nn.Module, __: Any, output: Any) -> None:
        output.logits.mul_(1.1)

    model.register_forward_hook(scale)
    with pytest.raises(ModelError, match="differ by 9%"):
        Tail.capture(ModelTree.of(model), 1, ROWS, SPLITS, pad_id=0)


def test_half_precision_is_no_reason_to_refuse() -> None:
    model = zoo.build("llama").bfloat16()
    tail = Tail.capture(ModelTree.of(model), 1, ROWS, SPLITS, pad_id=0)
    assert tail.state.dtype == torch.bfloat16


def test_split_rows_pads_before_and_after() -> None:
    before, mask_before, after, mask_after = split_rows([[5, 6, 7], [8]], [2, 0], 1)
    assert before.tolist() == [[5, 6], [1, 1]]
    assert mask_before.tolist() == [[1, 1], [0, 0]]
    assert after.tolist() == [[7], [8]]
    assert mask_after.tolist() == [[1], [1]]


def test_a_model_without_a_vocabulary_says_so() -> None:
    base: Any = zoo.build("llama").base_model
    tail = Tail.capture(ModelTree.of(base), 1, ROWS, SPLITS, pad_id=0)
    with pytest.raises(ModelError, match="AutoModelForCausalLM"):
        tail.logits(tail.hidden(torch.zeros(len(ROWS), 1, 32)))


@pytest.mark.parametrize("kind", zoo.EXPERTS)
def test_logits_behind_a_mixture_of_experts(kind: str) -> None:
    model = zoo.build(kind)
    tail = Tail.capture(ModelTree.of(model), 1, ROWS, SPLITS, pad_id=0)
    assert_like_whole(model, tail, 1, torch.randn(len(ROWS), 32), ROWS, SPLITS)


def test_products_of_few_digits_are_no_reason_to_run_whole_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = ModelTree.of(zoo.build("llama"))
    monkeypatch.setattr(Tail, "_difference", lambda *_: 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(captured(tree, 0, ROWS, SPLITS, 0), Tail)
    assert isinstance(captured(tree, 0, ROWS, SPLITS, 0), WholeRows)
