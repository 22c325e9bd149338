# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A saved edit in the format of another program."""

# torch is imported when the function runs, so that help on the command line does not wait for it.

from __future__ import annotations

from typing import Literal

from lightning_edit.artifacts.apply import apply
from lightning_edit.artifacts.outcomes import Written

__all__ = ["export"]


def export(
    delta: str,
    to: Literal["lora", "gguf", "hf"] = "lora",
    output: str = "exported",
    model: str | None = None,
    rank: int | None = None,
    force: bool = False,
    others: list[str] | None = None,
    uniform: bool = False,
) -> Written:
    """Writes a saved edit in the format of another program.

    A change of rank r is a LoRA adapter of rank r, exactly. Dense changes are cut to their
    largest singular values, and what that leaves out is reported.

    Args:
        delta: Folder of the saved edit, or of the run that saved it.
        to: `lora` is an adapter that peft loads beside the base model; `gguf` the same with a
            file `adapter.gguf` for llama.cpp; `hf` a whole edited model, as `apply` writes it.
        output: Folder to write.
        model: The base model, of which an adapter needs only the configuration. By default the
            one that the edit names.
        rank: Largest rank of the adapter in a module. By default nothing is left out.
        force: Replace a model or an adapter that lies in the output folder.
        others: Folders of further edits of weights, whose changes the adapter holds, too.
        uniform: Write one rank for all modules, as servers with several adapters want it. Smaller
            ones are filled with zeros.

    Returns:
        What was written.

    Raises:
        ArtifactError: If an adapter cannot hold the edit (it is of a memory, changes norms, biases
            or embeddings, or a dense change needs a `rank`), the edit is damaged, or llama.cpp
            does not know the architecture.
        ModelError: If the model cannot be found.
    """
    from lightning_edit.artifacts.combined import combine
    from lightning_edit.artifacts.folders import check_output
    from lightning_edit.core.errors import ArtifactError

    if to == "hf":
        for name, is_given in (("rank", rank is not None), ("uniform", uniform)):
            if is_given:
                raise ArtifactError(
                    f"`{name}` is of adapters, but `hf` writes the whole model, exactly. Leave it "
                    "out, or export to `lora`."
                )
        if others:
            raise ArtifactError(
                "`others` is of adapters. Write a model with several edits by `apply`, one after "
                "the other."
            )
        return apply(delta, model, output, force=force)
    combined = combine([delta, *(others or [])], model, rank)
    folder = check_output(output, force=force, inputs=(*combined.folders, combined.source))
    combined.save(folder, uniform=uniform, gguf="adapter.gguf" if to == "gguf" else "")
    return Written(folder, "LoRA adapter", combined.facts(), combined.notes())
