# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The cells of a comparison, each known by the hash of all that makes it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from lightning_edit.benchmark.specs import DataSpec, ProtocolSpec, Resolved, Study
from lightning_edit.core.request import EditRequest
from lightning_edit.report.results import plain

__all__ = ["Cell", "cells_of", "content_sha256", "digest", "unedited_parts"]

FORMAT_VERSION = 1
# Packages that a number may depend on.
PACKAGES = ("lightning-edit", "torch", "transformers")


@dataclass(frozen=True)
class Cell:
    """One run: a method on a data set by a protocol with a seed.

    Args:
        key: SHA-256 of all that makes it, in hexadecimal.
        method: Label of the method.
        data: Label of the data set.
        protocol: How edits are made and measured.
        seed: Of all that is drawn, and of the order of the requests.
        made_of: What the key is the hash of.
    """

    key: str
    method: str
    data: str
    protocol: ProtocolSpec
    seed: int
    made_of: Mapping[str, object]

    @property
    def labels(self) -> dict[str, object]:
        """What it is called in tables."""
        return {
            "method": self.method,
            "data": self.data,
            "protocol": self.protocol.label,
            "seed": self.seed,
        }


def cells_of(study: Study, model_sha256: str, device: str) -> Iterator[Cell]:
    """All cells of a study, those of one data set together.

    Args:
        study: The study.
        model_sha256: Hash of the model's weights.
        device: Type of the device that runs them: seconds are a part of a result.
    """
    for data in study.data:
        shared = unedited_parts(study, data, model_sha256)
        for protocol in study.protocols:
            for method in study.methods:
                for seed in study.seeds:
                    made_of = {
                        **shared,
                        "method": _about(study.resolved[method.name]),
                        "protocol": asdict(protocol),
                        "seed": seed,
                        "precision": study.precision,
                        "device": device,
                    }
                    key = digest(made_of)
                    yield Cell(key, method.name, data.name, protocol, seed, made_of)


def unedited_parts(study: Study, data: DataSpec, model_sha256: str) -> dict[str, object]:
    """What the unedited model's scores on a data set depend on."""
    return {
        "format_version": FORMAT_VERSION,
        "model": {"sha256": model_sha256, "dtype": study.dtype},
        "data": {
            "sha256": content_sha256(data.source.requests),
            "known": data.known,
            "limit": data.limit,
        },
        "max_new_tokens": study.max_new_tokens,
        "chat_template": study.chat_template,
        "system_prompt": study.system_prompt,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def content_sha256(requests: Sequence[EditRequest]) -> str:
    """SHA-256 over requests with all their probes, in order, in hexadecimal.

    Examples:
        >>> from lightning_edit.demos import tiny_requests
        >>> content_sha256(tiny_requests(2)) == content_sha256(tiny_requests(2))
        True
    """
    sha256 = hashlib.sha256()
    for request in requests:
        sha256.update(_json(request.to_dict()))
    return sha256.hexdigest()


def digest(parts: Mapping[str, object]) -> str:
    """SHA-256 over JSON types, whatever the order of their names, in hexadecimal.

    Examples:
        >>> digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1})
        True
    """
    return hashlib.sha256(_json(parts)).hexdigest()


def _about(resolved: Resolved) -> dict[str, object]:
    return {
        "class": f"{resolved.cls.__module__}.{resolved.cls.__qualname__}",
        "settings": plain(resolved.settings),
        "files": dict(resolved.files),
    }


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
