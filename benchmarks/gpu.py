# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What edits of a model of 8 B parameters take on a GPU, against what the GPU could do.

    python benchmarks/gpu.py                                    # 8 B; the tiny model without a GPU
    python benchmarks/gpu.py --budget 400 --out gpu.jsonl
    python benchmarks/gpu.py --size 1b --methods ROME

The model has the shapes of Llama 3 (8 B, or 1 B of 3.2) and random weights in bfloat16, made on
the GPU. Requests are random words of the package's own tokenizer, as long as those of CounterFact
are in Llama's tokens: a subject inside the prompt, 1 to 6 tokens after it, targets of 1 to 3. All
searches make all of their passes. Second moments are the identity and a thousand random
directions with four fifths of the trace. So nothing here says how good an edit is.

A row gives seconds, the share of the limit, and the most memory that was held. The limit is what
the needed work takes at the rate of a large product of matrices, which is measured first, or at
the measured bandwidth of memory where that takes longer. With B the multiplications of a block's
matrices, H those of the head (D · V), s passes, l the edited layer and L blocks, the needed
operations are, each multiplication counted as two,

    tokens before subjects: 2 B L              (read once, for keys and values)
    tokens from subjects on: 2 B (l + 1)       (read once up to the edit)
        and 2 B (L - l - 1) (2 s - 1)          (forward in each pass, back in all but the last)
    places where a loss is read: 2 H (2 s - 1)
    MEMIT and AlphaEdit, tokens up to subjects: 2 B (blocks that are run again between the layers)

without padding, attention's scores, norms, solves, hashes and the look at the written model, all
of which are in the seconds. Bytes are those of the weights, read once in each of these passes.
What is made once for a model (hash of its weights, factor of the second moments) has rows of its
own.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
}
COUNTS = {"ROME": (1, 8, 32), "MEMIT": (1, 32, 256), "AlphaEdit": (1, 32, 256)}
TINY_COUNTS = {"ROME": (1, 4), "MEMIT": (1, 4), "AlphaEdit": (1, 4)}
STEPS = 25
SYLLABLES = ("ba", "do", "fe", "gu", "ki", "lo", "me", "nu", "pa", "ri", "so", "te", "vu")
HEADER = "what | requests | seconds | each second | share of the limit | limit by | peak GB"


# -- the model, and what it is asked -------------------------------------------------------------


def build(size: str, device: torch.device) -> Any:
    """A Llama with random weights, made where it is to be."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **SIZES[size], rope_theta=500000.0, pad_token_id=0, eos_token_id=1, bos_token_id=None
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(device).eval().requires_grad_(False)
    take_cache(model)
    return model


def take_cache(model: Any) -> None:
    """Lets a model of transformers before 5.24 take ``cache``, then ``past_key_values``."""
    if "cache" in inspect.signature(model.forward).parameters:
        return

    def renamed(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def call(*args: Any, cache: Any = None, **kwargs: Any) -> Any:
            return own(*args, **kwargs, **({} if cache is None else {"past_key_values": cache}))

        known = inspect.signature(own)
        named = [p for p in known.parameters.values() if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in known.parameters.values() if p.kind is p.VAR_KEYWORD]
        own_cache = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
        call.__signature__ = known.replace(  # type: ignore[attr-defined]
            parameters=[*named, own_cache, *rest]
        )
        return call

    for module in (model, model.base_model):
        module.forward = renamed(module.forward)
    model.generate = renamed(model.generate)


@dataclass
class Words:
    """Random words of a tokenizer, a token each."""

    words: list[str]
    draw: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311

    @classmethod
    def of(cls, tokenizer: Any) -> Words:
        """Those of a tokenizer that marks the space before a word as GPT-2 does."""
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        words = [p[1:] for p in pieces if p[0] == "Ġ" and p[1:].isalpha() and len(p) > 3]
        return cls([word for word in words if word.isascii()])

    def text(self, count: int) -> str:
        """So many of them."""
        return " ".join(self.draw.choice(self.words) for _ in range(count))

    def requests(self, count: int) -> list[Any]:
        """Requests, each about a subject of its own."""
        from lightning_edit import EditRequest, Probe

        names = ("".join(parts).capitalize() for parts in itertools.product(SYLLABLES, repeat=3))
        return [
            EditRequest(
                f"The {self.text(3)} {{}} {self.text(1 + i % 6)}",
                name,
                self.text(1 + i // 2 % 3),
                rephrases=(f"{self.text(5)} {name} {self.text(2)}",),
                locality=(Probe(f"The {self.text(6)}", self.text(1)),),
                id=str(i),
            )
            for i, name in enumerate(itertools.islice(names, count))
        ]

    def contexts(self, counts: Sequence[int]) -> list[str]:
        """The bare prompt, and contexts of so many tokens."""
        return ["{}", *(f"The {self.text(count - 1)}. {{}}" for count in counts)]


def second_moment(width: int, device: torch.device) -> Tensor:
    """The identity and random directions that have four fifths of the trace, [M, M]."""
    rank = min(1024, width // 4)
    directions = torch.randn(width, rank, device=device)
    moment = directions @ directions.mT * (4 / rank)
    moment.diagonal().add_(1.0)
    return (moment + moment.mT) / 2


# -- the limit -----------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def matrix_rate(device: torch.device) -> float:
    """Operations a second of a large product of random matrices."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    return 2 * size**3 / statistics.median(timed(lambda: left @ right, device) for _ in range(11))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.randint(9, (2**30 if device.type == "cuda" else 2**24,), device=device).byte()
    goal = torch.empty_like(source)
    for _ in range(2):
        goal.copy_(source)
    copies = (timed(lambda: goal.copy_(source), device) for _ in range(7))
    return 2 * len(source) / statistics.median(copies)


@dataclass(frozen=True)
class Work:
    """What has to be done: operations and bytes of weights."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model's parts, in weights."""

    block: int
    head: int
    blocks: int
    width: int  # bytes of a weight

    @classmethod
    def of(cls, model: Any) -> Shapes:
        """Those of a model."""
        from lightning_edit.core.locator import ModelTree

        blocks = ModelTree.of(model).blocks
        matrices = [p for p in blocks[0].parameters() if p.ndim == 2]
        weight = model.get_output_embeddings().weight
        count = sum(p.numel() for p in matrices)
        return cls(count, weight.numel(), len(blocks), weight.element_size())

    def through(self, tokens: int, blocks: float, heads: float = 0, reads: int = 0) -> Work:
        """Tokens through so many blocks, and places through so many heads."""
        return Work(
            2.0 * (tokens * blocks * self.block + reads * heads * self.head),
            self.width * (blocks * self.block + heads * self.head),
        )

    def edit(self, editor: Any, requests: Sequence[Any]) -> Work:
        """An edit of some requests; see the top of the file."""
        from lightning_edit.modules.locate_then_edit.target_rows import TargetRows

        layers = [site.layer for site in editor.sites(editor.tree)]
        last, steps = layers[-1], editor.settings.steps
        rows = TargetRows.of(editor.tokens, requests, editor.templates, editor.settings.kl_prompt)
        before = sum(rows.splits)
        after = sum(map(len, rows.ids)) - before
        passes = 2 * steps - 1
        above = self.blocks - last - 1
        reads = len(rows.row) + len(rows.anchor)
        work = self.through(before, self.blocks) + self.through(after, last + 1)
        work += self.through(after, above * passes, passes, reads)
        if len(layers) > 1:
            ends = before + len(rows.ids) - sum(rows.splits[n] + 1 for n in rows.anchor)
            again = layers[0] + sum(last - layer + 1 for layer in layers)
            work += self.through(ends, again)
        return work


# -- rows ----------------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows as they come: one a line, with what there is of the budget."""

    device: torch.device
    rate: float
    bandwidth: float
    budget: float
    out: Path | None
    began: float = field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Prints a line at once."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def keep(self, row: dict[str, Any]) -> None:
        """Keeps a row, also in the file."""
        self.rows.append(row)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.perf_counter() - self.began)

    def measure(
        self,
        name: str,
        count: int,
        run: Callable[[], object],
        work: Work | None = None,
        *,
        expected: float = 0.0,
        turns: int = 1,
        **more: Any,
    ) -> float | None:
        """Times a run and writes its row; None where the budget does not allow it.

        Args:
            name: What is run.
            count: Requests or tokens of a run.
            run: The run.
            work: What it has to do, if that is known.
            expected: Seconds that it may take.
            turns: Runs of which the median counts.
            more: Further figures.
        """
        if expected * turns > self.left:
            self.say(f"{name} | {count} | left out: {self.left:.0f} s are left | | | |")
            self.keep({"what": name, "count": count, "left_out": True})
            return None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = statistics.median(timed(run, self.device) for _ in range(turns))
        except torch.OutOfMemoryError as error:
            self.say(f"{name} | {count} | out of memory | | | |")
            self.keep({"what": name, "count": count, "error": str(error)})
            return None
        row: dict[str, Any] = {
            "what": name,
            "count": count,
            "seconds": seconds,
            "each_second": count / seconds,
            **{key: value() if callable(value) else value for key, value in more.items()},
        }
        share, by = "–", "–"
        if work is not None:
            limits = {
                "products": work.operations / self.rate,
                "memory": work.bytes / self.bandwidth,
            }
            by = max(limits, key=limits.__getitem__)
            row |= {"operations": work.operations, "bytes": work.bytes, "limit_by": by}
            row["share"] = limits[by] / seconds
            share = f"{row['share']:.0%}"
        peak = "–"
        if self.device.type == "cuda":
            row["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
            peak = f"{row['peak_gigabytes']:.1f}"
        self.keep(row)
        self.say(
            f"{name} | {count} | {seconds:.3f} | {count / seconds:.2f} | {share} | {by} | {peak}"
        )
        return seconds


def edits(
    table: Table, model: Any, words: Words, method: str, counts: Sequence[int], steps: int
) -> None:
    """Rows of one method: what is made once, then edits of so many requests."""
    import lightning_edit as le
    from lightning_edit.demos import tiny_tokenizer

    lengths = [5] * 10 + [10] * 10 if method == "ROME" else [10] * 5
    flat = words.contexts(lengths)
    contexts: Any = flat if method == "ROME" else [flat[:1], flat[1:]]
    editor: Any = getattr(le, method).from_model(
        model, tiny_tokenizer(), context_templates=contexts, steps=steps, stop_loss=0.0
    )
    layers = [site.layer for site in editor.sites(editor.tree)]
    requests = words.requests(max(counts) + 1)
    spent = {"search": 0.0}
    search = editor.target_values

    def searched(*args: Any) -> Any:
        found: list[Any] = []
        spent["search"] = timed(lambda: found.append(search(*args)), table.device)
        return found[0]

    editor.target_values = searched
    table.measure(f"{method}: hash of all weights", 1, lambda: editor.base.sha256)
    moment = second_moment(editor.sites(editor.tree)[0].in_features, table.device)
    for layer in layers:
        editor.set_second_moment(layer, moment)
    del moment

    def derive() -> None:
        for layer in layers:
            (editor.protected if method == "AlphaEdit" else editor.factor)(layer)

    large = table.device.type == "cuda" and model.config.hidden_size > 2048
    expected = 20.0 * len(layers) if large and method == "AlphaEdit" else 5.0
    made = table.measure(
        f"{method}: factors of second moments", len(layers), derive, expected=expected
    )
    if made is None:
        return
    editor.edit(requests[:1])  # warms kernels and allocators up
    shapes = Shapes.of(model)
    last, before = 5.0, 1
    for count in counts:
        some = requests[1 : count + 1]
        found = table.measure(
            method,
            count,
            functools.partial(editor.edit, some),
            shapes.edit(editor, some),
            expected=last * count / before,
            turns=3 if count == 1 else 1,
            search_seconds=lambda: spent["search"],
        )
        if found is None:
            return
        last, before = found, count


def statistics_row(table: Table, model: Any, words: Words, large: bool) -> None:
    """Tokens a second of second moments, of five layers, from a text."""
    from lightning_edit.core.batch import PromptTokenizer
    from lightning_edit.core.locator import ModelTree
    from lightning_edit.demos import tiny_tokenizer
    from lightning_edit.modules.locate_then_edit.second_moment import second_moments
    from lightning_edit.modules.locate_then_edit.spread import lower_layers

    tree, tokens = ModelTree.of(model), PromptTokenizer(tiny_tokenizer())
    layers = lower_layers(tree)
    last = layers[-1]
    width = tree.mlp_out(last).in_features
    count = 4 * width // 64 * 64 if large else 256
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(words.text(count + 64), encoding="utf-8")

        def run() -> None:
            per = -(-count // width) if large else max(1, count // width)
            second_moments(
                tree, tokens, layers, model_hash="", text=str(text), tokens_per_dimension=per
            )

        own = Work(len(layers) * count * width * (width + 1.0))  # of a symmetric sum
        work = Shapes.of(model).through(count, last + 1) + own
        table.measure(f"second moments of {len(layers)} layers", count, run, work, expected=30)


def reading_rows(table: Table, model: Any, words: Words, large: bool) -> None:
    """Rows of evaluation and of generation."""
    from lightning_edit.core.batch import PromptTokenizer
    from lightning_edit.demos import tiny_tokenizer
    from lightning_edit.evaluation.evaluator import Evaluator
    from lightning_edit.passes.sampling import sample_text_ids

    tokens = PromptTokenizer(tiny_tokenizer())
    requests = words.requests(64 if large else 4)
    forced = Evaluator(model, tokens, readings=["teacher_forced"], max_new_tokens=8)
    both = Evaluator(model, tokens, max_new_tokens=8)
    baseline = both.baseline(requests)
    for name, evaluator in (("teacher-forced", forced), ("with texts of 8 tokens", both)):
        evaluator.evaluate(requests[:2], baseline)
        table.measure(
            f"evaluation, {name}",
            len(requests),
            functools.partial(evaluator.evaluate, requests, baseline),
            expected=20,
        )
    count, shapes = 64 * 64 if large else 64, Shapes.of(model)
    sample_text_ids(model, tokens, 64, 0)
    # 64 rows of a token each are written to 64 tokens, one after another.
    work = shapes.through(count // 64, 63 * shapes.blocks, 63, count // 64)
    table.measure(
        "generation, tokens of 64 rows" if large else "generation, tokens of a row",
        count,
        lambda: sample_text_ids(model, tokens, count, 0),
        work,
        expected=20,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=list(SIZES), help="8b on a GPU, tiny elsewhere")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which it ends")
    parser.add_argument("--methods", nargs="*", default=list(COUNTS), choices=list(COUNTS))
    parser.add_argument("--counts", type=int, nargs="+", help="requests of each method")
    parser.add_argument("--steps", type=int, help=f"passes of each search; {STEPS}, or 5 if tiny")
    parser.add_argument("--out", type=Path, help="a file that gets each row as a line of JSON")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if has_gpu else "cpu")
    size = options.size or ("8b" if has_gpu else "tiny")
    large = size != "tiny"
    table = Table(device, matrix_rate(device), bandwidth(device), options.budget, options.out)
    table.began = began
    name = torch.cuda.get_device_name() if has_gpu else "no GPU, so the processor"
    from transformers import __version__ as transformers_version

    from lightning_edit.demos import tiny_tokenizer

    model: nn.Module = build(size, device)
    synchronize(device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    about = {
        "device": name,
        "size": size,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "tflops": table.rate / 1e12,
        "gigabytes_a_second": table.bandwidth / 1e9,
        "weights_gigabytes": weights,
        "build_seconds": time.perf_counter() - began,
    }
    table.keep(about)
    table.say(
        f"{name}; size {size}, {weights:.1f} GB of weights; products {table.rate / 1e12:.1f} "
        f"TFLOP/s, memory {table.bandwidth / 1e9:.0f} GB/s; torch {torch.__version__}, "
        f"transformers {transformers_version}; ready after {about['build_seconds']:.0f} s\n"
    )
    table.say(HEADER + "\n" + " | ".join(["---"] * len(HEADER.split(" | "))))
    words = Words.of(tiny_tokenizer())
    counts = COUNTS if large else TINY_COUNTS
    steps = options.steps or (STEPS if large else 5)

    def edited(method: str) -> None:
        if method in options.methods:
            edits(table, model, words, method, options.counts or counts[method], steps)

    edited("ROME")
    edited("MEMIT")
    statistics_row(table, model, words, large)
    reading_rows(table, model, words, large)
    edited("AlphaEdit")  # last, since its eigenvectors take longest
    table.say("\n" + json.dumps({"about": about, "rows": table.rows[1:]}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of edits that a model of random weights does not take
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
