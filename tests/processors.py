# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Runs pytest on this CPU's other instruction sets: `python -m tests.processors -m 'not slow'`.

A plain run of pytest is on the set that PyTorch chooses by itself. The number of threads changes
the order in which numbers are added, too, so that each set has another one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["main"]

# PyTorch's kernels heed the first variable, and the libraries that it calls their own.
SETS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OMP_NUM_THREADS": "2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "4",
    },
}
# Threads that spin while they wait would take the cores from each other: four times the time.
SHARING = {"OMP_WAIT_POLICY": "passive"}
# Each includes those before it; the last one is never but a CPU's own.
ORDER = [*SETS, "avx512"]


def own_set() -> str:
    """The set that PyTorch chooses here; also one of another architecture, such as ``sve256``."""
    plain = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    program = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    words = [sys.executable, "-c", program]
    return subprocess.check_output(words, env=plain, text=True).strip().lower()


def main(arguments: Sequence[str]) -> int:
    """Runs pytest with these arguments on each set; the status is 1 if one of them is red."""
    own, red = own_set(), []
    # A CPU of another architecture has the first alone.
    last = ORDER.index(own) if own in ORDER else 1
    for place, name in enumerate(ORDER):
        if name == own:
            print(f"== {name}: what a plain run of pytest uses here", flush=True)
        elif place >= last:
            print(f"== {name}: left out, as this CPU lacks it", flush=True)
        else:
            print(f"== {name}", flush=True)
            words = [sys.executable, "-m", "pytest", *arguments]
            chosen = {**os.environ, **SETS[name], **SHARING}
            if subprocess.run(words, env=chosen, check=False).returncode:
                red.append(name)
    print(f"== red: {', '.join(red) or 'none'}", flush=True)
    return bool(red)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
