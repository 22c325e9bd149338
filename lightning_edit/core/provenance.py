# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Where an edit comes from: the method, the base model and the requests."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BaseModelInfo", "Provenance"]


@dataclass(frozen=True)
class BaseModelInfo:
    """Which weights an edit belongs to.

    Args:
        id: Hub id or folder the model was loaded from.
        revision: Revision of a hub model.
        dtype: Name of the weights' dtype, such as ``float32``.
        sha256: Hash of all weights before the edit, as ``core.hashing.weight_hash`` makes it.
        parameters: Number of parameters.
    """

    id: str = ""
    revision: str | None = None
    dtype: str = ""
    sha256: str = ""
    parameters: int = 0


@dataclass(frozen=True)
class Provenance:
    """Where an edit comes from: written beside it, never read to compute anything.

    Args:
        method: Name of the editor, such as ``ROME``.
        paper: Address of the paper that describes the method.
        settings: The editor's hyper-parameters, as JSON types.
        base: The model that was edited.
        request_ids: Ids of the requests that the edit answers, in order.
    """

    method: str = ""
    paper: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    base: BaseModelInfo = field(default_factory=BaseModelInfo)
    request_ids: tuple[str, ...] = ()
