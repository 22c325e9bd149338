# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Saved edits on a running server: as versions of an adapter, with a share each, and undo."""

# torch is imported when the function runs, so that help on the command line does not wait for it.

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_edit.artifacts.outcomes import Patch, ServedName, ServedPatches, ServerContents

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_edit.serving import Deployment, LiveServer

__all__ = ["serve_patch"]

Action = Literal["make", "push", "pull", "undo", "list", "status"]
ServerKind = Literal["vllm", "sglang", "llama.cpp", "transformers"]


def serve_patch(
    action: Action,
    edits: list[str] | None = None,
    server: ServerKind = "vllm",
    url: str | None = None,
    name: str = "edits",
    folder: str | None = None,
    model: str | None = None,
    rank: int | None = None,
    share: float = 1.0,
    version: int | None = None,
    seen_as: str = "",
    timeout: float = 60.0,
    api_key_env: str = "LIGHTNING_EDIT_API_KEY",
) -> ServedPatches | ServerContents:
    """Puts saved edits on a running server as an adapter, lists them, and takes them back.

    Each set of edits is a version, an adapter of its own in the folder, whose record `served.json`
    says which versions are live. `push` leaves the version before loaded, for requests that still
    ask for it; `undo` and `pull` take off what they end.

    Args:
        action: `make` writes a version; `push` writes one, if edits are given, and has the server
            answer with it; `pull` takes one off, or all; `undo` goes back to what was live before
            the last push or pull; `list` asks the server what it has; `status` reads the record.
        edits: Folders of saved edits, or of the runs that saved them, whose sum is the version.
        server: Kind of the server. `transformers` takes a whole edited model, the others an
            adapter.
        url: Its address. By default the port of this machine that its kind listens on.
        name: Of the set of edits. Its versions are NAME-v1, NAME-v2 and so on.
        folder: Where versions are kept, which the server must be able to read; by default `served`
            and the name.
        model: The base model. By default the one that the edits name.
        rank: Largest rank of the adapter in a module. By default nothing is left out.
        share: Of the traffic that the version gets, by `lightning_edit.serving.choose`. The others
            keep what is left of theirs, in proportion.
        version: Number of the version to push or pull. By default the newest is pushed, and all
            are pulled.
        seen_as: The folder as the server sees it, where that is another path.
        timeout: Seconds to wait for an answer of the server.
        api_key_env: Name of the environment variable with the server's key, if it wants one.

    Returns:
        The versions, or what the server lists.

    Raises:
        ArtifactError: If an edit is damaged, or an adapter cannot hold it.
        ModelError: If the base model cannot be found.
        ServerError: If the server does not answer or refuses. What is live is as before then.
    """
    from lightning_edit.core.errors import ServerError
    from lightning_edit.serving import Deployment

    deployment = Deployment(folder or Path("served") / name, name, seen_as=seen_as)
    if edits and (action not in ("make", "push") or version is not None):
        raise ServerError("Edits are of `make` and `push`, which make a new version of them.")
    if action == "status":
        return _status(deployment, f"`{name}` in {deployment.folder}")
    if action == "make" or edits:
        _make(deployment, edits or [], server, model, rank)
    if action == "make":
        return _status(deployment, f"Wrote {deployment.version().name}", _start(deployment, server))
    live = _server(server, url, timeout, api_key_env, deployment)
    if action == "list":
        names = (
            ServedName(one.name, one.path, one.scale, "adapter" if one.is_adapter else "base")
            for one in live.served()
        )
        return ServerContents(tuple(names))
    if action == "push":
        pushed = deployment.push(live, version, share)
        return _status(deployment, f"Pushed {pushed.name}")
    if action == "pull":
        deployment.pull(live, version)
        return _status(deployment, "Pulled")
    deployment.undo(live)
    return _status(deployment, "Undone")


def _make(
    deployment: Deployment, edits: list[str], kind: ServerKind, model: str | None, rank: int | None
) -> None:
    from lightning_edit.artifacts.apply import apply
    from lightning_edit.artifacts.combined import combine
    from lightning_edit.core.errors import ArtifactError

    if kind == "transformers":
        if len(edits) != 1 or rank is not None:
            raise ArtifactError(
                "`transformers serve` reads whole models, without a `rank`, and `serve-patch` "
                "merges one edit into its base. Write a model with several by `apply`, one after "
                "the other, and name its folder in requests."
            )

        def merge(place: Path, _: str) -> None:
            apply(edits[0], model, str(place))

        deployment.add(merge, edits=(str(Path(edits[0]).absolute()),), base=model or "")
        return
    combined = combine(edits, model, rank)
    gguf = kind == "llama.cpp"
    deployment.add(
        lambda place, name: combined.save(place, uniform=True, gguf=f"{name}.gguf" if gguf else ""),
        edits=tuple(str(path.absolute()) for path in combined.folders),
        base=combined.source,
        rank=combined.rank,
        relative_error=combined.relative_error,
    )


def _start(deployment: Deployment, kind: ServerKind) -> tuple[str, ...]:
    """How a server of a kind is started with the newest version."""
    newest = deployment.version()
    place = deployment.seen_path_of(newest)
    match kind:
        case "llama.cpp":
            return (f"llama-server --lora {place / newest.name}.gguf --no-cache-prompt",)
        case "vllm":
            return (f"vllm serve --enable-lora --max-lora-rank {newest.rank}",)
        case "sglang":
            options = f"--enable-lora --max-lora-rank {newest.rank} --lora-target-modules all"
            return (f"python -m sglang.launch_server {options}",)
        case "transformers":
            return ("transformers serve",)


def _server(
    kind: ServerKind, url: str | None, timeout: float, api_key_env: str, deployment: Deployment
) -> LiveServer:
    from lightning_edit import serving

    at: dict[str, str] = {} if url is None else {"url": url}
    made: dict[ServerKind, Callable[[], LiveServer]] = {
        "vllm": lambda: serving.VLLM(**at, timeout=timeout, api_key_env=api_key_env),
        "sglang": lambda: serving.SGLang(**at, timeout=timeout, api_key_env=api_key_env),
        "llama.cpp": lambda: serving.LlamaCpp(**at, timeout=timeout, api_key_env=api_key_env),
        "transformers": lambda: serving.TransformersServe(
            **at,
            timeout=timeout,
            api_key_env=api_key_env,
            folders={
                one.name: str(deployment.seen_path_of(one))
                for one in deployment.versions
                if one.name in deployment.live
            },
        ),
    }
    return made[kind]()


def _status(deployment: Deployment, title: str, notes: tuple[str, ...] = ()) -> ServedPatches:
    patches = tuple(
        Patch(
            one.number,
            one.name,
            deployment.live.get(one.name, 0.0),
            one.sha256,
            one.rank,
            one.relative_error,
            one.edits,
            one.created,
        )
        for one in deployment.versions
    )
    rest = 1.0 - sum(deployment.live.values())
    if not patches:
        notes = ("There is no version yet.",)
    elif not deployment.live:
        notes = (*notes, "None is live: the base answers.")
    elif rest > 1e-9:
        notes = (*notes, f"The base answers {rest:.0%}.")
    return ServedPatches(title, patches, notes)
