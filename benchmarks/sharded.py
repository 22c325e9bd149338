# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a process, and what it sends, where two share a model by FSDP2.

    python benchmarks/sharded.py                     # 0.5 B parameters, ROME and MEMIT
    python benchmarks/sharded.py --layers 4          # a smaller one

A Llama with random weights is saved to a folder; one process, and then two with gloo, each make an
edit of a request by a Trainer, in processes of their own. C is the identity, since what counts here
is its size. ``peak`` is the resident set of a process at most, ``imports`` what it had before it
loaded the model; ``sent`` is what the collectives of a step gave to a process, and ``largest`` the
largest tensor among them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

METHODS = ("ROME", "MEMIT")


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that collectives fill."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            sizes = [t.nbytes for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
            self.total += sum(sizes)
            self.largest = max(self.largest, *sizes, 0)
        return found


class Watch(Callback):
    """Sets second moments, and counts what a step sends."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.seconds = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        _ = pl_module.base  # hashed once, before the first edit
        for site in pl_module.sites(pl_module.tree):
            pl_module.set_second_moment(site.layer, torch.eye(site.in_features))

    @override
    def on_train_batch_start(self, *_: object) -> None:
        self.seconds = time.perf_counter()
        self.traffic.__enter__()  # type: ignore[no-untyped-call]

    @override
    def on_train_batch_end(self, *_: object) -> None:
        self.traffic.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.seconds = time.perf_counter() - self.seconds


def peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def edit(method: str, folder: Path, processes: int) -> None:
    """Makes an edit as one of some processes, and prints what that took."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    import lightning_edit
    from lightning_edit.data import EditDataModule
    from lightning_edit.demos import tiny_requests

    torch.set_num_threads(1)
    strategy: Any = "auto" if processes == 1 else ModelParallelStrategy(processes, 1)
    editor = getattr(lightning_edit, method)(
        model=str(folder), steps=2, context_templates=["{}"], cache_dir=str(folder / "cache")
    )
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_epochs=1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    imports = peak()
    trainer.fit(editor, EditDataModule(requests=tiny_requests(1)))
    row = {
        "method": method,
        "processes": processes,
        "rank": int(os.environ.get("RANK", "0")),
        "parameters": sum(p.numel() for p in editor.model.parameters()),
        "model_megabytes": round(sum(p.numel() for p in editor.model.parameters()) * 4 / 2**20),
        "imports_megabytes": round(imports / 2**20),
        "peak_megabytes": round(peak() / 2**20),
        "sent_megabytes": round(watch.traffic.total / 2**20, 2),
        "largest_megabytes": round(watch.traffic.largest / 2**20, 2),
        "seconds": round(watch.seconds, 1),
    }
    sys.stdout.write(json.dumps(row) + "\n")


def build(folder: Path, layers: int, width: int, inner: int) -> None:
    """Saves a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_edit.demos import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=8192,
        tie_word_embeddings=True,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    parser.add_argument("--folder", type=Path, help="of a model that was built before")
    parser.add_argument("--method", choices=METHODS, help="edit by this one in this process")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    if given.method:
        edit(given.method, given.folder, given.processes)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), given.layers, given.width, given.inner)
        for method in METHODS:
            for processes in (1, 2):
                start = [sys.executable]
                if processes > 1:
                    start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
                words = ["--folder", folder, "--method", method, "--processes", str(processes)]
                done = subprocess.run(
                    [*start, __file__, *words],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
                sys.stdout.write("\n".join(lines) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
