# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Second moments of keys: what is summed, where it is kept, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_edit import AlphaEdit
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ArtifactError, LocatorError, ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.tensor_files import read_sealed
from lightning_edit.data import EditDataModule, TextDataModule
from lightning_edit.demos import tiny_requests, tiny_tokenizer, world_sentences
from lightning_edit.functional.moments import regularize, second_moment_update
from lightning_edit.modules.locate_then_edit.moments import SecondMoments
from lightning_edit.modules.locate_then_edit.second_moment import (
    data_module_ids,
    second_moments,
    text_file_ids,
)
from lightning_edit.passes.sampling import sample_text_ids, seeded
from tests import zoo
from tests.distributed.second_moments import estimate
from tests.processes import run_pair


@pytest.fixture
def model() -> Any:
    return zoo.build("llama")


@pytest.fixture
def tokens() -> PromptTokenizer:
    return PromptTokenizer(tiny_tokenizer())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{prompt} {answer}." for prompt, answer in world_sentences()) * 2)
    return file


def keys_of(model: Any, layer: int, rows: Tensor) -> Tensor:
    """Inputs of the MLP's output projection at every token, as float64."""
    seen: list[Tensor] = []

    def record(_: nn.Module, args: Any) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]).double())

    hook = ModelTree.of(model).mlp_out(layer).module(model).register_forward_pre_hook(record)
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2", "falcon"])
def test_it_is_the_mean_of_outer_products(kind: str, tokens: PromptTokenizer, text: Path) -> None:
    model = zoo.build(kind)
    tree = ModelTree.of(model)
    width = tree.mlp_out(0).in_features
    found = second_moments(
        tree, tokens, [2, 0], model_hash="", text=str(text), tokens_per_dimension=2, ridge=0.5
    )
    rows = text_file_ids(tokens, text, 2 * width)
    assert rows.shape == (-(-2 * width // 64), 64)
    assert list(found) == [0, 2]
    for layer, moment in found.items():
        keys = keys_of(model, layer, rows)
        mean = keys.T @ keys / len(keys)
        wanted = mean + 0.5 * mean.diagonal().mean() * torch.eye(width)
        torch.testing.assert_close(moment, wanted.float(), rtol=1e-3, atol=1e-5)
        assert torch.linalg.eigvalsh(moment.double())[0] > 0


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    keys = torch.randn(30, 4)
    parts = torch.zeros(4, 4, dtype=torch.float64)
    for part in torch.split(keys, 7):
        second_moment_update(parts, part)
    whole = second_moment_update(torch.zeros(4, 4, dtype=torch.float64), keys)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        regularize(whole, 30, 0.0), (keys.T @ keys / 30), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="no keys"):
        regularize(whole, 0, 0.1)


def test_negative_layers_and_repetitions(model: Any, tokens: PromptTokenizer, text: Path) -> None:
    tree = ModelTree.of(model)
    found = second_moments(tree, tokens, [-1, 2], model_hash="", text=str(text))
    assert list(found) == [2]
    with pytest.raises(LocatorError, match="Layer 3 does not exist"):
        second_moments(tree, tokens, [3], model_hash="", text=str(text))


def test_the_pass_ends_after_the_last_layer_that_is_needed(
    model: Any, tokens: PromptTokenizer, text: Path
) -> None:
    tree = ModelTree.of(model)
    ran: list[int] = []
    for i, block in enumerate(tree.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    second_moments(tree, tokens, [1], model_hash="", text=str(text), tokens_per_dimension=1)
    assert set(ran) == {0, 1}


def count_passes(model: Any) -> list[int]:
    passes: list[int] = []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def test_the_cache_spares_the_second_estimate(
    model: Any, tokens: PromptTokenizer, tmp_path: Path
) -> None:
    tree = ModelTree.of(model)
    passes = count_passes(model)

    def moments(layers: list[int], model_hash: str = "abc", **settings: Any) -> dict[int, Tensor]:
        passes.clear()
        return second_moments(
            tree,
            tokens,
            layers,
            model_hash=model_hash,
            tokens_per_dimension=1,
            cache_dir=tmp_path,
            **settings,
        )

    first = moments([0])
    assert passes
    [file] = (tmp_path / "second_moments").iterdir()
    assert file.name.startswith("abc-0-")
    again = moments([0])
    assert not passes
    assert torch.equal(first[0], again[0])
    # The ridge is no part of what is kept.
    stiffer = moments([0], ridge=1.0)
    assert not passes
    assert stiffer[0].trace() > 1.5 * first[0].trace()
    # Another layer, seed or model is another estimate; what is known is not estimated again.
    both = moments([0, 1])
    assert passes
    assert torch.equal(both[0], first[0])
    assert not torch.equal(moments([0], seed=1)[0], first[0])
    assert passes
    moments([0], model_hash="other")
    assert passes
    assert len(list((tmp_path / "second_moments").iterdir())) == 4


def test_a_damaged_cache_is_written_again(
    model: Any, tokens: PromptTokenizer, tmp_path: Path
) -> None:
    def moment() -> Tensor:
        return second_moments(
            ModelTree.of(model),
            tokens,
            [0],
            model_hash="abc",
            tokens_per_dimension=1,
            cache_dir=tmp_path,
        )[0]

    first = moment()
    [file] = (tmp_path / "second_moments").iterdir()
    (found, about), whole = read_sealed(file), file.read_bytes()
    kept = {name: tensor.clone() for name, tensor in found.items()}  # which lie in the file
    file.write_bytes(whole[: len(whole) // 2])
    assert torch.equal(moment(), first)
    again, said = read_sealed(file)  # whose bytes have what is said in any order
    assert said == about
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())


def test_nothing_is_kept_where_no_folder_or_hash_is_given(
    model: Any, tokens: PromptTokenizer, text: Path, tmp_path: Path
) -> None:
    tree = ModelTree.of(model)
    second_moments(tree, tokens, [0], model_hash="", text=str(text), cache_dir=tmp_path / "a")
    second_moments(tree, tokens, [0], model_hash="abc", text=str(text))
    assert not (tmp_path / "a").exists()


def test_another_text_is_another_estimate(
    model: Any, tokens: PromptTokenizer, text: Path, tmp_path: Path
) -> None:
    def moment() -> Tensor:
        return second_moments(
            ModelTree.of(model),
            tokens,
            [0],
            model_hash="abc",
            text=str(text),
            cache_dir=tmp_path,
        )[0]

    first = moment()
    text.write_text(text.read_text()[500:])  # the same name
    assert not torch.equal(moment(), first)


def test_hooks_are_gone_whatever_happens(
    model: Any, tokens: PromptTokenizer, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModelTree.of(model).mlp_out(0).module(model)
    second_moments(ModelTree.of(model), tokens, [0], model_hash="", text=str(text))
    assert not module._forward_pre_hooks

    def fail(*_: Any) -> None:
        raise RuntimeError("told to")

    monkeypatch.setattr(
        "lightning_edit.modules.locate_then_edit.second_moment.second_moment_update", fail
    )
    with pytest.raises(RuntimeError, match="told to"):
        second_moments(ModelTree.of(model), tokens, [0], model_hash="", text=str(text))
    assert not module._forward_pre_hooks


def test_sampled_text_comes_from_the_seed_alone(model: Any, tokens: PromptTokenizer) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = sample_text_ids(model, tokens, 100, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(one, sample_text_ids(model, tokens, 100, seed=0))
    assert not torch.equal(one, sample_text_ids(model, tokens, 100, seed=1))
    assert one.shape == (2, 64)
    assert not set(one[:, 0].tolist()) & set(tokens.tokenizer.all_special_ids)


def test_seeded_gives_the_callers_draws_back() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    with seeded(0):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), wanted)
    assert not torch.equal(inside, wanted)


def test_text_files_that_cannot_be_read(tokens: PromptTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"second_moment_text.*no file"):
        text_file_ids(tokens, tmp_path / "missing.txt", 10)
    short = tmp_path / "short.txt"
    short.write_text("The capital of")
    with pytest.raises(ModelError, match=r"has 3 tokens, fewer than 64"):
        text_file_ids(tokens, short, 10)


def test_a_text_shorter_than_wanted_is_read_in_whole_rows(
    tokens: PromptTokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The capital of Dorin" * 50)
    ids = tokens.tokenizer(file.read_text()).input_ids
    rows = text_file_ids(tokens, file, 10_000)
    assert rows.shape == (len(ids) // 64, 64)
    assert rows.flatten().tolist() == ids[: rows.numel()]


class Batches(LightningDataModule):
    """A data module of batches that are given."""

    def __init__(self, *batches: Any) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Any:
        return self.batches


def test_data_modules_give_texts_requests_and_tokens(
    tokens: PromptTokenizer, tmp_path: Path
) -> None:
    encode = tokens.tokenizer
    texts = [f"{prompt} {answer}." for prompt, answer in world_sentences()]
    wanted = [i for text in texts for i in encode(text).input_ids]
    file = tmp_path / "lines.txt"
    file.write_text("\n\n".join(texts))
    rows = data_module_ids(tokens, TextDataModule(path=str(file), batch_size=3), 128)
    assert rows.flatten().tolist() == wanted[:128]
    # Padded on either side, of which nothing is to be read.
    ids = [encode(text).input_ids for text in texts]
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    batch = {"input_ids": padded, "attention_mask": mask}
    assert torch.equal(data_module_ids(tokens, Batches(batch), 128), rows)
    # Tokens without a mask are all read.
    plain = data_module_ids(tokens, Batches({"input_ids": rows}), 128)
    assert torch.equal(plain, rows)
    requests = tiny_requests(24)
    facts = [f"{r.prompt} {r.target_old}." for r in requests]
    rows = data_module_ids(tokens, EditDataModule(requests=requests, batch_size=5), 128)
    assert rows.flatten().tolist() == [i for f in facts for i in encode(f).input_ids][:128]
    with pytest.raises(ModelError, match=r"a batch of Batches is a int. Texts, edit requests"):
        data_module_ids(tokens, Batches(3), 128)
    with pytest.raises(ModelError, match=r"Batches has 0 tokens, fewer than 64"):
        data_module_ids(tokens, Batches([]), 128)


def test_an_editor_reads_a_data_module(text: Path) -> None:
    model = zoo.build("llama")
    data = TextDataModule(path=str(text))
    settings: dict[str, Any] = {"layers": [1], "tokens_per_dimension": 1}
    editor = AlphaEdit.from_model(model, tiny_tokenizer(), second_moment_text=data, **settings)
    own = AlphaEdit.from_model(model, tiny_tokenizer(), **settings)
    assert not torch.equal(editor.second_moment(1), own.second_moment(1))
    # Named in the settings, but no object that a checkpoint would have to pickle.
    assert editor.hparams["second_moment_text"] == "TextDataModule"
    file = AlphaEdit.from_model(model, tiny_tokenizer(), second_moment_text=str(text), **settings)
    torch.testing.assert_close(editor.second_moment(1), file.second_moment(1))
    assert file.hparams["second_moment_text"] == str(text)


def test_saved_second_moments_belong_to_their_model(tmp_path: Path) -> None:
    def editor_of(seed: int, file: str | None = None) -> Any:
        torch.manual_seed(seed)
        model = zoo.build("llama", seed=seed)
        return AlphaEdit.from_model(
            model, tiny_tokenizer(), layers=[0, 1], tokens_per_dimension=1, second_moment=file
        )

    editor = editor_of(0)
    file = editor.save_second_moments(tmp_path / "new" / "moments.safetensors")
    again = editor_of(0, str(file))
    for layer in (0, 1):
        assert torch.equal(again.second_moment(layer), editor.second_moment(layer))
    kept = {name: p.clone() for name, p in editor.model.named_parameters()}
    other = editor_of(1, str(file))
    with pytest.raises(ArtifactError, match=r"`second_moment`: .* was made from a model with the"):
        other.edit(tiny_requests(1))
    # An editor whose model was edited still knows that they are its own.
    again.edit_optimizer.stage(again.edit(tiny_requests(1)))
    again.edit_optimizer.step()
    again.moments = SecondMoments(again.moments.settings)
    assert torch.equal(again.second_moment(1), editor.second_moment(1))
    assert all(torch.equal(p, kept[n]) for n, p in editor.model.named_parameters())


@pytest.mark.parametrize("source", ["text", "samples"])
def test_processes_share_the_rows_and_have_the_moments_of_all(
    tokens: PromptTokenizer, text: Path, tmp_path: Path, source: str
) -> None:
    model = zoo.build("llama")
    tree = ModelTree.of(model)
    # More rows than a batch, so that there is something to share.
    settings: dict[str, Any] = {"model_hash": "abc", "tokens_per_dimension": 100}
    text.write_text(text.read_text() * 100)
    settings["text"] = str(text) if source == "text" else None
    whole = second_moments(tree, tokens, [0, 2], **settings)
    run_pair(estimate, tmp_path, settings["text"])
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for layer, moment in whole.items():
        assert torch.equal(found[0][layer], found[1][layer])
        torch.testing.assert_close(found[0][layer], moment, rtol=1e-5, atol=1e-7)
    # Each process runs only its part of the batches, and does so again for what one has lost.
    batches = -(-100 * tree.mlp_out(0).in_features // (64 * 64))
    assert batches > 1
    assert [one["passes"] for one in found] == [-(-batches // 2), batches // 2]
    assert [one["again"] for one in found] == [one["passes"] for one in found]
