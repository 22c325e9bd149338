# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What an edit costs when there are many: CPU seconds and peak memory, in a batch and in sequence.

    python benchmarks/scaling.py                                   # the tiny model, up to 10 000
    python benchmarks/scaling.py --modes run --editors GRACE       # with a checkpoint each
    python benchmarks/scaling.py --modes run --editors GRACE --held 10000 --counts 20 70
    python benchmarks/scaling.py --modes run --keep DIR            # goes on where it was stopped
    python benchmarks/scaling.py --keep DIR --plot FILE.png        # draws what it found
    python benchmarks/scaling.py --model smollm2 --counts 1 10 100
    python benchmarks/scaling.py --model smollm2 --device cuda     # seconds and memory of the GPU
    python benchmarks/scaling.py --sums 4096 14336 --counts 1 64 512 2047 2049  # one matrix alone
    python benchmarks/scaling.py --entries --counts 100 1000 10000  # GRACE's memory alone

``batch`` writes all requests at once, ``sequence`` commits them one after another, and ``run`` is a
run of the Trainer with batches of one and a checkpoint after each: it also tells the bytes that an
edit has the checkpoint write, and those that it has in the end. With ``--keep`` each figure of a
run is on disk as soon as it is known, and the same command goes on from the checkpoint of one that
was stopped. ``--held`` puts so many entries into GRACE's memory before. Requests are made up, each
about a subject of its own. A process of its own takes each editor and mode, so that peaks are
theirs; statistics and contexts are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

EDITORS = ("ROME", "MEMIT", "AlphaEdit")
MODES = ("batch", "sequence")
SYLLABLES = ("ba", "do", "fe", "gu", "ki", "lo", "me", "nu", "pa", "ri", "so", "te", "vu")
PLACES = ("Brune", "Delph", "Ostia", "Marn")


def requests_of(count: int) -> list[Any]:
    """Made-up requests, each about a subject of its own."""
    from lightning_edit import EditRequest

    names = itertools.product(SYLLABLES, repeat=4)
    return [
        EditRequest(
            "The town of {} lies on the", "".join(name).capitalize(), PLACES[i % 4], id=str(i)
        )
        for i, name in enumerate(itertools.islice(names, count))
    ]


def seconds_on(device: str) -> float:
    """CPU seconds, or those of the clock when a GPU has done all it was asked for."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_on(device: str) -> float:
    """Most gigabytes that were held."""
    import torch

    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30


def measure(
    model_name: str,
    method: str,
    mode: str,
    counts: list[int],
    device: str,
    limit: float,
    keep: str | None,
    held: int,
) -> dict[str, Any]:
    import torch

    import lightning_edit as le
    from lightning_edit.demos import tiny_model, tiny_tokenizer

    torch.set_num_threads(1)
    model: Any
    if model_name == "tiny":
        model, tokenizer = tiny_model(), tiny_tokenizer()
        place: dict[str, Any] = {"layers": [1] if method == "ROME" else [0, 1, 2]}
    else:
        model, tokenizer = le.load_model(model_name), le.load_tokenizer(model_name)
        place = {"preset": "smollm2"}
    contexts: Any = ["{}", "It is said. {}", "Long ago, as they tell. {}"]
    settings: dict[str, Any] = {"steps": 5}
    if method == "GRACE":
        place = {"radius": 0.01}
    else:
        settings["context_templates"] = contexts
    model = model.to(device)
    editor: Any = getattr(le, method).from_model(model, tokenizer, **place, **settings)
    if method != "GRACE":
        for site in editor.sites(editor.tree):
            editor.second_moment(site.layer)
    if held:
        fill(editor, held)
    if mode == "run":
        if keep is not None:
            return measure_run(editor, counts, device, limit, Path(keep))
        with tempfile.TemporaryDirectory() as name:
            return measure_run(editor, counts, device, limit, Path(name))
    requests = requests_of(max(counts))
    editor.edit(requests[:1])  # warms allocators and kernels up
    seconds, peaks = [], []
    done, began = 0, seconds_on(device)
    for count in counts:
        if mode == "batch":
            began = seconds_on(device)
            editor.edit(requests[:count])
            seconds.append((seconds_on(device) - began) / count)
        else:
            for request in requests[done:count]:
                editor.edit_optimizer.stage(editor.edit(request))
                editor.edit_optimizer.step()
            now = seconds_on(device)  # of the edits since the last count
            seconds.append((now - began) / (count - done))
            done, began = count, now
        peaks.append(peak_on(device))
    return {"seconds": seconds, "peak_gigabytes": peaks}


def fill(editor: Any, count: int) -> None:
    """Commits entries of GRACE that no pass has made, at once."""
    import torch

    from lightning_edit.core.committed import RequestBatch
    from lightning_edit.core.provenance import Provenance
    from lightning_edit.core.side_memory import MemoryEntry

    entries = {}
    for i, request in enumerate(requests_of(10000 + count)[10000:]):
        tensors = {"keys": torch.randn(128), "values": torch.randn(32), "radii": torch.tensor(0.01)}
        known = {"prompt": request.prompt, "target": request.target_new, "distance": 0.0}
        notes = {"label": [i], "initial_radius": 0.01}
        entries[request.id] = MemoryEntry(tensors, {request.id: known}, notes)
        editor.history.append({"id": request.id, "placed": "added", "loss": 1.0, "took": True})
    edit = editor.memory_write(entries)
    edit.provenance = Provenance(request_ids=tuple(entries))
    edit.batches = tuple(RequestBatch((r,)) for r in requests_of(10000 + count)[10000:])
    editor.session.commit(edit)


def measure_run(
    editor: Any, counts: list[int], device: str, limit: float, keep: Path
) -> dict[str, Any]:
    """A run of the Trainer, which is stopped when its seconds are over, or goes on from there."""
    from lightning.pytorch import Callback, Trainer
    from torch.utils.data import DataLoader

    import lightning_edit as le

    name = type(editor).__name__
    folder, rows = keep / name, keep / f"{name}.jsonl"
    last = folder / "last.ckpt"

    class Meter(Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self.done, self.bytes = trainer.global_step, 0
            self.sizes = dict[tuple[str, int], int]()
            self.began, self.first = seconds_on(device), time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            stats = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
            # A file that is replaced is written anew; one that grew, as far as it did.
            sizes = {(name, stat.st_ino): stat.st_size for name, stat in stats.items()}
            self.bytes += sum(size - self.sizes.get(key, 0) for key, size in sizes.items())
            self.sizes = sizes
            step, is_over = trainer.global_step, time.perf_counter() - self.first > limit
            if step not in counts and not is_over:
                return
            now, edits = seconds_on(device), step - self.done
            found = {
                "count": step,
                "seconds": (now - self.began) / edits,
                "peak_gigabytes": peak_on(device),
                "written": self.bytes / edits,
                "held": sum(sizes.values()),
            }
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            self.began, self.done, self.bytes = now, step, 0
            trainer.should_stop = is_over

    data: Any = DataLoader(cast(Any, requests_of(max(counts))), batch_size=1, collate_fn=list)
    trainer = Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[le.EditCheckpoint(str(folder)), Meter()],
    )
    keep.mkdir(parents=True, exist_ok=True)
    trainer.fit(editor, data, ckpt_path=str(last) if last.exists() else None)
    return table_of(rows)


def table_of(file: Path) -> dict[str, Any]:
    """The figures of a run, each as a list over counts."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {name: [row[name] for row in rows] for name in rows[0]}


def measure_sums(rows: int, columns: int, counts: list[int]) -> dict[str, Any]:
    """Seconds of adding an edit of rank one to a sum, writing that and computing its norm."""
    import torch
    from torch import nn

    from lightning_edit import WeightDelta
    from lightning_edit.core.change import LowRank

    torch.set_num_threads(1)
    layer = nn.Linear(columns, rows, bias=False)
    originals = {"weight": layer.weight.detach().clone()}

    def one() -> WeightDelta:
        left, right = torch.randn(rows, 1), torch.randn(columns, 1)
        return WeightDelta({"weight": LowRank(1e-4 * left, right)})

    total, seconds, held = one(), [], []
    for count in range(2, max(counts) + 2):
        is_timed = count - 1 in counts
        if is_timed:
            total.write_(layer, originals)  # as after each edit of a run
        began = time.process_time()
        total = total + one()
        if is_timed:
            total.write_(layer, originals)
            total.norm()
            seconds.append(time.process_time() - began)
            held.append(total.nbytes)
    return {"counts": counts, "seconds": seconds, "held": held}


def measure_entries(counts: list[int]) -> list[float]:
    """Seconds that GRACE takes for an edit beside the model's passes."""
    import torch

    from lightning_edit import GRACE
    from lightning_edit.core.committed import RequestBatch
    from lightning_edit.core.provenance import Provenance
    from lightning_edit.core.side_memory import MemoryEntry
    from lightning_edit.demos import tiny_model, tiny_tokenizer

    torch.set_num_threads(1)
    editor = GRACE.from_model(tiny_model(), tiny_tokenizer())
    seconds, done, began = [], 0, time.process_time()
    for count, request in enumerate(requests_of(max(counts)), 1):
        [asked] = editor.session.unanswered([request])
        entries = editor.entries_without([asked.id])
        if entries:
            editor.memory.rows("keys", entries)
        tensors = {"keys": torch.randn(128), "values": torch.randn(32), "radii": torch.ones(())}
        entries[asked.id] = MemoryEntry(tensors, {asked.id: {"distance": 0.0}}, {"label": [1]})
        edit = editor.memory_write(entries)
        edit.provenance = Provenance(request_ids=(asked.id,))
        edit.batches = (RequestBatch((asked,)),)
        editor.session.commit(edit)
        if count in counts:
            now = time.process_time()
            seconds.append((now - began) / (count - done))
            began, done = now, count
    return seconds


def plot(keep: Path, picture: Path) -> None:
    """Draws what runs in a folder came to: time, memory and bytes written against edits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for file in sorted(keep.glob("*.jsonl")):
        found = table_of(file)
        curves = (
            ([1000 * each for each in found["seconds"]], "milliseconds an edit"),
            ([1024 * each for each in found["peak_gigabytes"]], "peak megabytes"),
            ([each / 1000 for each in found["written"]], "kilobytes written an edit"),
        )
        for axes, (values, title) in zip(panels, curves, strict=True):
            axes.plot(found["count"], values, "o-", markersize=3, label=file.stem)
            axes.set(title=title, xlabel="edits")
            axes.set_ylim(0, max(axes.get_ylim()[1], 1.3 * max(values)))
    panels[0].legend(frameon=False)
    figure.savefig(picture, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100, 1000, 10000])
    parser.add_argument("--editors", nargs="+", default=list(EDITORS))
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument(
        "--here", action="store_true", help="measure the one named, in this process"
    )
    parser.add_argument("--sums", type=int, nargs=2, help="rows and columns of one matrix")
    parser.add_argument("--entries", action="store_true", help="a memory alone, without passes")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which a run ends")
    parser.add_argument("--keep", help="a folder to keep figures and checkpoints of runs in")
    parser.add_argument("--held", type=int, default=0, help="entries that a memory begins with")
    parser.add_argument("--plot", type=Path, help="a picture to draw of what --keep has")
    options = parser.parse_args()
    counts = sorted(options.counts)
    if options.plot is not None:
        plot(Path(options.keep), options.plot)
        return
    if options.entries:
        for count, each in zip(counts, measure_entries(counts), strict=True):
            sys.stdout.write(f"{count} entries: {1000 * each:.2f} ms\n")
        return
    if options.sums:
        rows, columns = options.sums
        found = measure_sums(rows, columns, counts)
        for count, seconds, held in zip(counts, found["seconds"], found["held"], strict=True):
            sys.stdout.write(f"{count} terms: {seconds:.3f} s, {held / 1e6:.0f} MB\n")
        return
    if options.here:
        [editor], [mode] = options.editors, options.modes
        limits = options.device, options.limit, options.keep, options.held
        found = measure(options.model, editor, mode, counts, *limits)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    results: dict[str, Any] = {}
    sys.stdout.write("editor | mode | " + " | ".join(f"{n} edits" for n in counts) + "\n")
    for editor, mode in itertools.product(options.editors, options.modes):
        command = [sys.executable, __file__, "--here", "--model", options.model]
        command += [
            "--device",
            options.device,
            "--editors",
            editor,
            "--modes",
            mode,
            "--limit",
            str(options.limit),
            "--counts",
            *map(str, counts),
        ]
        command += ["--held", str(options.held)]
        if options.keep is not None:
            command += ["--keep", options.keep]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.strip().splitlines()[-1])
        cells = [
            f"{1000 * s:.1f} ms, {peak:.2f} GB"
            for s, peak in zip(found["seconds"], found["peak_gigabytes"], strict=True)
        ]
        if mode == "run":
            cells = [
                f"{count}: {cell}, {written / 1000:.0f} kB written, {held / 1000:.0f} kB held"
                for cell, count, written, held in zip(
                    cells, found["count"], found["written"], found["held"], strict=True
                )
            ]
        sys.stdout.write(f"{editor} | {mode} | " + " | ".join(cells) + "\n")
        sys.stdout.flush()
        results[f"{editor}/{mode}"] = found
    # What an edit costs at the largest count, against ten edits.
    base = counts.index(10) if 10 in counts else 0
    ratio = {
        name: round(
            found["seconds"][-1] / found["seconds"][min(base, len(found["seconds"]) - 1)], 2
        )
        for name, found in results.items()
    }
    sys.stdout.write(json.dumps({"ratio": ratio, "counts": counts, **results}) + "\n")


if __name__ == "__main__":
    main()
