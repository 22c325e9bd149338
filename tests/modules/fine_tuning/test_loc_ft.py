# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""LocFT: breadth-first keeps what depth-first loses, and the answer ends where it should."""

from __future__ import annotations

from lightning_edit import FineTune, LocFT
from lightning_edit.core.locator import ModelTree
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.modules.helpers import autoregressive, bare_trainer
from tests.zoo import build

REQUESTS = tiny_requests(12)


def test_breadth_first_keeps_what_depth_first_loses() -> None:
    breadth = LocFT.from_model(*trained_tiny_model(), lr=5e-3)
    data = EditDataModule(requests=REQUESTS, batch_size=6)
    bare_trainer(max_epochs=40).fit(breadth, datamodule=data)
    depth = FineTune.from_model(*trained_tiny_model(), lr=5e-3, steps=40)
    data = EditDataModule(requests=REQUESTS, batch_size=1)
    bare_trainer(max_epochs=1).fit(depth, datamodule=data)
    assert list(breadth.committed().changes) == list(depth.committed().changes)
    assert autoregressive(breadth, REQUESTS, "reliability") > 0.9
    assert autoregressive(depth, REQUESTS[-1:], "reliability") == 1.0
    assert autoregressive(depth, REQUESTS, "reliability") < 0.7


def test_answers_end_with_the_end_token() -> None:
    request = REQUESTS[0]
    texts = []
    for end_token in (True, False):
        model, tokenizer = trained_tiny_model()
        editor = LocFT.from_model(model, tokenizer, lr=1e-2, steps=40, end_token=end_token)
        with editor.edit(request).applied(model):
            prompt = tokenizer(request.prompt, return_tensors="pt")
            written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
            texts.append(tokenizer.decode(written[0, prompt.input_ids.shape[1] :]))
    assert texts[0] == " Kettleby<end>"
    assert texts[1].startswith(" Kettleby")
    assert not texts[1].startswith(" Kettleby<end>")


def test_default_layer_is_late_but_not_beyond_the_last() -> None:
    assert LocFT().default_layers(ModelTree.of(build("llama"))) == [2]
    for count in (1, 2, 3, 12, 30, 32):
        tree = ModelTree.of(build("llama"))
        tree.blocks[:] = tree.blocks[:1] * count
        [layer] = LocFT().default_layers(tree)
        assert 0 <= layer < count
        assert FineTune().default_layers(tree) == [layer]
    assert LocFT().default_layers(tree) == [22]  # of 32, as in the settings for Llama 3
