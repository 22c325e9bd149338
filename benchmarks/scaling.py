# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What an edit costs when there are many: CPU seconds and peak memory, in a batch and in sequence.

    python benchmarks/scaling.py                                   # the tiny model, up to 10 000
    python benchmarks/scaling.py --model smollm2 --counts 1 10 100
    python benchmarks/scaling.py --model smollm2 --device cuda     # seconds and memory of the GPU

``batch`` writes all requests at once, ``sequence`` commits them one after another, as a run of
batches of one does. Requests are made up, each about a subject of its own. A process of its own
takes each editor and mode, so that peaks are theirs; statistics and contexts are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from typing import Any

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
    model_name: str, method: str, mode: str, counts: list[int], device: str
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
    settings: dict[str, Any] = {"context_templates": contexts, "steps": 5}
    model = model.to(device)
    editor: Any = getattr(le, method).from_model(model, tokenizer, **place, **settings)
    for site in editor.sites(editor.tree):
        editor.second_moment(site.layer)
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
    options = parser.parse_args()
    counts = sorted(options.counts)
    if options.here:
        [editor], [mode] = options.editors, options.modes
        found = measure(options.model, editor, mode, counts, options.device)
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
            "--counts",
            *map(str, counts),
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.strip().splitlines()[-1])
        cells = [
            f"{1000 * s:.1f} ms, {peak:.2f} GB"
            for s, peak in zip(found["seconds"], found["peak_gigabytes"], strict=True)
        ]
        sys.stdout.write(f"{editor} | {mode} | " + " | ".join(cells) + "\n")
        sys.stdout.flush()
        results[f"{editor}/{mode}"] = found
    # What an edit costs at the largest count, against ten edits.
    base = counts.index(10) if 10 in counts else 0
    ratio = {
        name: round(found["seconds"][-1] / found["seconds"][base], 2)
        for name, found in results.items()
    }
    sys.stdout.write(json.dumps({"ratio": ratio, "counts": counts, **results}) + "\n")


if __name__ == "__main__":
    main()
