# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits of wrapped models are edits of the model in them, under its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_edit import Edit, EditMemory, TrainedEditor, WeightDelta
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.wrappers import is_compiled, plain_parameters, unwrapped
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.evaluator import Evaluator
from tests.contract.enumeration import EDITORS, LEARNERS, RememberingEditor, quick
from tests.modules.helpers import circumstances, same, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*survives rounding:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft 0.21
]

ALL = {**EDITORS, RememberingEditor.__name__: RememberingEditor, **LEARNERS}


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def with_compiled_blocks(model: Any) -> Any:
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


def compiled_in_place(model: Any) -> Any:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, config)


WRAPPERS = (compiled, with_compiled_blocks, compiled_in_place, adapted)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_edits_have_the_names_of_the_plain_model(
    wrap: Any, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    requests, tokenizer = tiny_requests(2), trained_tiny_model()[1]
    wrapped = wrap(trained_tiny_model()[0])
    before, weights = circumstances(wrapped), snapshot(wrapped)
    for name, cls in ALL.items():
        if issubclass(cls, TrainedEditor) and wrap is adapted:
            continue  # trained beside other weights
        with subtests.test(name):
            try:
                editor = cls.from_model(wrapped, tokenizer, **quick(cls))
            except ModelError as error:
                words = ("is compiled", "lies in an adapter")
                assert any(word in str(error) for word in words)  # noqa: PT017
                assert EditMemory.find(wrapped) is None
                assert circumstances(wrapped) == before
                continue
            plain = cls.from_model(trained_tiny_model()[0], tokenizer, **quick(cls))
            assert editor.base.sha256 == plain.base.sha256
            if name in LEARNERS:
                assert editor.trained_for() == plain.trained_for()
                memory = EditMemory.find(wrapped)
                if memory is not None:
                    memory.detach_()
                continue
            edit, wanted = editor.edit(requests), plain.edit(requests)
            assert circumstances(wrapped) == before
            assert same(wrapped, weights)
            edit.save(tmp_path / name)
            loaded, model = Edit.load(tmp_path / name), trained_tiny_model()[0]
            loaded.apply_(model)
            if isinstance(edit, WeightDelta):
                assert list(edit.changes) == list(wanted.changes)
                for one in edit.changes:
                    found, right = edit.dense(one), wanted.dense(one)
                    assert (found - right).norm() < 1e-2 * right.norm(), one
                # Into the wrapped one it goes as well, and out again.
                loaded.apply_(wrapped)
                assert weight_hash(wrapped) == weight_hash(model)
                loaded.revert_(wrapped)
                assert same(wrapped, weights)
            else:
                loaded.revert_(model)
                memory = EditMemory.find(wrapped)
                assert memory is not None
                memory.detach_()


def test_a_memory_is_not_put_where_nobody_looks() -> None:
    edit = EDITORS["GRACE"].from_model(*trained_tiny_model(), steps=3).edit(tiny_requests(1))
    for wrap in (compiled, with_compiled_blocks, compiled_in_place):
        model = wrap(trained_tiny_model()[0])
        with pytest.raises(ModelError, match="is compiled, and would go on as if nothing"):
            edit.apply_(model)
        assert EditMemory.find(model) is None
        assert not any(module._forward_hooks for module in model.modules())


def test_a_prompt_that_was_learned_is_no_part_of_the_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(trained_tiny_model()[0], config)
    with pytest.raises(ModelError, match="a prompt that was learned"):
        EDITORS["ROME"].from_model(model, trained_tiny_model()[1])


def test_a_compiled_model_is_measured_as_the_plain_one() -> None:
    model, tokenizer = trained_tiny_model()
    tokens, prompts = PromptTokenizer(tokenizer), [r.prompt for r in tiny_requests(3)]
    wanted = Evaluator(model, tokens).continuations(prompts)
    for wrap in (compiled, compiled_in_place):
        assert Evaluator(wrap(model), tokens).continuations(prompts) == wanted


def test_what_is_shared_and_what_is_not() -> None:
    model = with_compiled_blocks(trained_tiny_model()[0])
    bare = unwrapped(model)
    assert is_compiled(model)
    assert not is_compiled(bare)
    assert bare is not model
    assert unwrapped(bare) is bare
    assert bare.lm_head is model.lm_head
    assert plain_parameters(model) == dict(bare.named_parameters())
    assert list(plain_parameters(model)) == [
        n for n, _ in trained_tiny_model()[0].named_parameters()
    ]
    bare.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    parallel = nn.DataParallel(nn.Linear(2, 2))
    assert list(plain_parameters(parallel)) == ["weight", "bias"]


def test_an_editor_that_is_refused_late_leaves_no_memory() -> None:
    """Its checkpoint is read once the memory is there."""
    wrapped = adapted(trained_tiny_model()[0])
    with pytest.raises(ArtifactError, match="does not fit the network"):
        RememberingEditor.from_model(wrapped, trained_tiny_model()[1], **quick(RememberingEditor))
    assert EditMemory.find(wrapped) is None
