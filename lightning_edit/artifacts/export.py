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
    to: Literal["lora", "hf"] = "lora",
    output: str = "exported",
    model: str | None = None,
    rank: int | None = None,
    force: bool = False,
) -> Written:
    """Writes a saved edit in the format of another program.

    A change of rank r is a LoRA adapter of rank r, exactly. Dense changes are cut to their
    largest singular values, and what that leaves out is reported.

    Args:
        delta: Folder of the saved edit, or of the run that saved it.
        to: `lora` is an adapter that peft loads beside the base model; `hf` a whole edited
            model, as `apply` writes it.
        output: Folder to write.
        model: The base model, of which an adapter needs only the configuration. By default the
            one that the edit names.
        rank: Largest rank of the adapter in a module. By default nothing is left out.
        force: Replace a model or an adapter that lies in the output folder.

    Returns:
        What was written.

    Raises:
        ArtifactError: If an adapter cannot hold the edit (it is of a memory, changes norms, biases
            or embeddings, or a dense change needs a `rank`), or the edit is damaged.
        ModelError: If the model cannot be found.
    """
    from lightning_edit.artifacts.adapters import model_skeleton, save_adapter
    from lightning_edit.artifacts.folders import check_output
    from lightning_edit.artifacts.sources import (
        base_name,
        facts_of,
        named_by,
        open_edit,
        revision_of,
    )
    from lightning_edit.core.delta import WeightDelta
    from lightning_edit.core.errors import ArtifactError

    if to == "hf":
        if rank is not None:
            raise ArtifactError(
                "`rank` is of adapters, but `hf` writes the whole model, exactly. Leave it out, "
                "or export to `lora`."
            )
        return apply(delta, model, output, force=force)
    artifact, edit = open_edit(delta)
    if not isinstance(edit, WeightDelta):
        raise ArtifactError(
            f"`{artifact}` holds an edit of a memory, which changes no weights, so no LoRA adapter "
            "can hold it. Write the base with its memory instead: `apply`, or `export` to `hf`."
        )
    source = base_name(edit, artifact, model)
    folder = check_output(output, force=force, inputs=(artifact, source))
    with named_by(edit, given=model is not None):
        skeleton = model_skeleton(source, revision_of(edit, source))
    factors = edit.to_lora(skeleton, rank)
    save_adapter(
        factors,
        folder,
        provenance=edit.provenance,
        is_encoder_decoder=bool(skeleton.config.is_encoder_decoder),
    )
    worst = max(factors, key=lambda name: factors[name].relative_error)
    error = factors[worst].relative_error
    ranks = sorted({pair.rank for pair in factors.values()})
    facts = {
        "base": source,
        **facts_of(edit),
        "rank": " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
        "left out": f"{error:.2g} of the change at most" if error else "nothing",
    }
    notes = (f"The most is left out of `{worst}`.",) if error > 1e-5 else ()
    return Written(folder, "LoRA adapter", facts, notes)
