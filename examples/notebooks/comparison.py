# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A researcher's comparison: the same facts, several editors, honest intervals.

A notebook as a script: ``python examples/notebooks/build.py`` makes ``comparison.ipynb``.
"""

# %% [markdown]
# # Which editor keeps the neighbors?
#
# Three methods on the same facts of the default model, each fact alone: retrieval (SCR), an
# adapter (LoRA) and a closed form (ROME). Every figure comes with its reading, its interval over
# *requests*, and a paired test. Four facts are few on purpose: the intervals say so themselves.

# %%
import tempfile
from pathlib import Path

import pandas as pd

from lightning_edit import DataSpec, Facts, compare

folder = Path(tempfile.mkdtemp())
frame = compare(
    methods=["SCR", "LoRA", "ROME"],
    data=[DataSpec(Facts(demo=True, limit=4), label="demo facts")],
    reference="LoRA",
    accelerator="cpu",
    out=str(folder),
    progress=False,
)
rates = frame[frame["is_final"] & (frame["kind"] == "") & (frame["reading"] != "")]
rates.pivot(index="method", columns=["metric", "reading"], values="value").round(2)

# %% [markdown]
# ## The gap between the readings
#
# Teacher-forced scores hand the model its own answer piece by piece. The gap is what that adds.

# %%
free = rates[rates["reading"] == "autoregressive"]
free.pivot(index="method", columns="metric", values="gap").round(2)

# %% [markdown]
# ## How sure is it?
#
# Intervals by bootstrap over requests; Wilson's where all score alike, for there a bootstrap is
# sure of too much. Differences are paired, p by sign flips: of four requests no difference can be
# significant.

# %%
columns = ["method", "value", "low", "high", "n", "requests", "difference", "p"]
free[free["metric"] == "locality"][columns].round(3)

# %% [markdown]
# ## What an edit changed
#
# One row an edit and probe, with the texts: the neighbors that read otherwise now.

# %%
rows = pd.read_parquet(folder / "edits.parquet")
moved = rows[(rows["metric"] == "locality") & (rows["text"] != rows["text_before"])]
moved[["prompt", "text_before", "text"]].head(6)

# %% [markdown]
# ## The files
#
# The page sorts and filters in any browser; the LaTeX goes into a paper. Called again, nothing is
# measured twice.

# %%
sorted(path.name for path in folder.glob("compare.*"))
