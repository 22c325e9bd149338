# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Second moments of an editor's layers, wherever they come from, and what is made of them."""

# Shapes: M inputs of the edited projection, E experts.

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError, LocatorError
from lightning_edit.core.hashing import tensor_hash
from lightning_edit.core.locator import MLPSite
from lightning_edit.core.processes import Processes
from lightning_edit.core.sharding import is_sharded
from lightning_edit.core.tensor_files import read_sealed, write_sealed
from lightning_edit.functional.least_squares import protected_directions
from lightning_edit.modules.locate_then_edit.second_moment import second_moments
from lightning_edit.modules.session import EditSession

__all__ = ["MomentSettings", "SecondMoments"]

# Largest difference of C and Cᵀ, relative to the largest entry, that rounding accounts for.
MAX_ASYMMETRY = 1e-3

# Inputs from which eigenvectors take longer to compute than to read.
_COSTLY = 2048

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class MomentSettings:
    """Where second moments come from.

    Args:
        file: A safetensors file that holds them; estimated when None.
        text: A text file or a data module to estimate them from; what the unedited model writes
            when None.
        tokens_per_dimension: Tokens that are read, as a multiple of the key's dimensions.
        ridge: Share of the mean eigenvalue that is added to the diagonal of estimates.
        seed: Seed of sampled texts.
        cache_dir: Folder for estimates; ``~/.cache/lightning_edit`` if None.
    """

    file: str | None = None
    text: str | LightningDataModule | None = None
    tokens_per_dimension: int = 4
    ridge: float = 1e-3
    seed: int = 0
    cache_dir: str | None = None


class _Moment:
    """C of a layer on the host, of which processes may keep a share of the rows each.

    Args:
        rows: C, [M, M] or [E, M, M].
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._processes = Processes()

    def whole(self, device: torch.device) -> Tensor:
        """All of it on a device; all processes that share it must ask."""
        return self._processes.joined(self._rows.to(device))

    def share_(self, processes: Processes) -> None:
        """Leaves most of it to others, if it is not shared already."""
        if self._processes.count == 1 < processes.count:
            self._rows = self._rows.tensor_split(processes.count)[processes.rank].clone()
            self._processes = processes


class SecondMoments:
    """C = E[k kᵀ] of the edited layers: given, read from a file, or estimated once.

    What is made of a second moment, such as its Cholesky factor, is kept for as long as that
    second moment is.

    Args:
        settings: Where those come from that are not given.
    """

    def __init__(self, settings: MomentSettings) -> None:
        self.settings = settings
        self._moments: dict[int, _Moment] = {}
        self._made: dict[
            tuple[int, Callable[..., object]], tuple[_Moment, tuple[object, ...], Any]
        ] = {}

    def give(self, sites: Sequence[MLPSite], layer: int, moment: Tensor) -> None:
        """Takes the second moment of a layer over, [M, M] or [E, M, M], in place of any other.

        Args:
            sites: The matrices to edit.
            layer: Index of the layer, from 0.
            moment: C, which is copied.

        Raises:
            LocatorError: If the layer is not edited or the shape does not fit.
            ArtifactError: If it cannot be a second moment.
        """
        shapes = {site.layer: site.moment_shape for site in sites}
        shape = shapes.get(layer)
        if tuple(moment.shape) != shape:
            raise LocatorError(
                f"A second moment of shape {list(moment.shape)} was given for layer {layer}; "
                f"expected {list(shape or ())} for one of the layers {sorted(shapes)}."
            )
        _check(layer, moment)
        # On the host: an edit needs what is made of it, which is where the model is.
        self._moments[layer] = _Moment(moment.detach().to("cpu", torch.float32, copy=True))

    def of(
        self,
        session: EditSession[WeightDelta],
        sites: Sequence[MLPSite],
        layer: int,
        processes: Processes | None = None,
    ) -> Tensor:
        """C of a layer of the unedited model, [M, M] or [E, M, M] float32, where the model is.

        Args:
            session: The model.
            sites: The matrices to edit; what is missing of any of them is found at once.
            layer: Index of the layer, from 0.
            processes: Those that all ask, and share out the work; this one alone if None.

        Raises:
            LocatorError: If the layer is not edited.
            ArtifactError: If the file cannot be read or does not fit.
            ModelError: If the text cannot be read or is too short.
        """
        self.find(session, sites, layer, processes)
        return self._moments[layer].whole(session.device)

    def find(
        self,
        session: EditSession[WeightDelta],
        sites: Sequence[MLPSite],
        layer: int,
        processes: Processes | None = None,
    ) -> None:
        """Reads or estimates C of a layer if it is not known; arguments and errors as in ``of``."""
        if layer not in self._moments:
            missing = [site for site in sites if site.layer not in self._moments]
            if layer not in [site.layer for site in missing]:
                raise LocatorError(
                    f"Layer {layer} has no second moment, since it is not edited. Ask for one of "
                    f"the layers {[site.layer for site in sites]}, or name it in `layers`."
                )
            if self.settings.file is not None:
                found = _read(self.settings.file, session, missing)
            else:
                found = self._estimated(session, missing, processes)
            for one, moment in found.items():
                self.give(sites, one, moment)

    def derived(
        self,
        session: EditSession[WeightDelta],
        layer: int,
        make: Callable[[Tensor, *Ts], T],
        *arguments: *Ts,
    ) -> T:
        """What a function makes of the second moment of a layer, which ``find`` has found.

        It is kept, and made anew for another second moment or with other arguments. Of the second
        moment itself each process keeps a share of the rows then, where they share the model.

        Args:
            session: The model; what is made is where it is.
            layer: Index of the layer, from 0.
            make: The function; it is given the second moment first.
            arguments: Its further arguments.

        Raises:
            ArtifactError: If the second moment does not allow it.
        """
        moment, given = self._moments[layer], (session.device, *arguments)
        kept = self._made.get((layer, make))
        if kept is not None and kept[0] is moment and kept[1] == given:
            found: T = kept[2]
            return found
        try:
            found = make(moment.whole(session.device), *arguments)
        except ValueError as error:
            raise ArtifactError(f"The second moment of layer {layer}: {error}") from error
        self._made[layer, make] = (moment, given, found)
        if is_sharded(session.model):
            moment.share_(Processes.running())
        return found

    def protected(
        self, moment: Tensor, threshold: float | None, share: float
    ) -> tuple[Tensor, float]:
        """Protected directions of a second moment and the gap after them; see ``least_squares``.

        Of a large one they are kept in the folder for estimates, since other runs would decompose
        it as long again.

        Args:
            moment: C, [..., M, M].
            threshold: Eigenvalues from which directions are protected, or None.
            share: Without a threshold, the share of the trace that they hold.

        Raises:
            ValueError: If the second moment does not allow it.
        """
        if moment.shape[-1] < _COSTLY:
            return protected_directions(moment, threshold, share)
        name = f"{tensor_hash(moment)[:20]}-protected-{threshold}-{share}.safetensors"
        file = self._folder / "second_moments" / name
        with suppress(OSError, ValueError, KeyError):  # missing or damaged: made anew
            kept, _ = read_sealed(file, is_needed=True)
            return kept["directions"].to(moment.device), float(kept["gap"])
        directions, gap = protected_directions(moment, threshold, share)
        about = {
            "directions": directions.cpu().contiguous(),
            "gap": torch.tensor(gap, dtype=torch.float64),
        }
        write_sealed(file, about, {})
        return directions, gap

    @property
    def _folder(self) -> Path:
        return Path(self.settings.cache_dir or Path.home() / ".cache" / "lightning_edit")

    def save(self, session: EditSession[WeightDelta], sites: Sequence[MLPSite], file: Path) -> Path:
        """Writes the second moments of the edited layers, with the hash of their model."""
        moments = {
            site.module_name: self.of(session, sites, site.layer).cpu().contiguous()
            for site in sites
        }
        about = {"base": session.model_id, "base_sha256": session.base.sha256}
        return write_sealed(file, moments, about)

    def _estimated(
        self,
        session: EditSession[WeightDelta],
        sites: Sequence[MLPSite],
        processes: Processes | None,
    ) -> dict[int, Tensor]:
        settings = self.settings
        with session.target.base_weights():
            return second_moments(
                session.tree,
                session.tokens,
                [site.layer for site in sites],
                model_hash=session.base.sha256,
                text=settings.text,
                tokens_per_dimension=settings.tokens_per_dimension,
                ridge=settings.ridge,
                seed=settings.seed,
                cache_dir=self._folder,
                processes=processes,
            )


def _read(
    file: str, session: EditSession[WeightDelta], sites: Sequence[MLPSite]
) -> dict[int, Tensor]:
    """Second moments of some layers from a file, if it belongs to the model."""
    try:
        tensors, about = read_sealed(Path(file))
        base = about.get("base_sha256", "")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"`second_moment`: cannot read `{file}` ({error}).") from None
    if base and base != session.base.sha256:
        raise ArtifactError(
            f"`second_moment`: `{file}` was made from a model with the weight hash "
            f"{base[:12]}…, but {session.model_id} has {session.base.sha256[:12]}…. Give the "
            "second moments of this model, or none to have them estimated."
        )
    for site in sites:
        if site.module_name not in tensors:
            raise ArtifactError(
                f"`second_moment`: `{file}` has no tensor `{site.module_name}`. It has "
                f"{', '.join(sorted(tensors)) or 'none'}."
            )
    return {site.layer: tensors[site.module_name] for site in sites}


def _check(layer: int, moment: Tensor) -> None:
    """Checks that a matrix can be a second moment; whether it is singular, a method asks.

    Raises:
        ArtifactError: If it is not finite, not symmetric, or has no positive trace.
    """
    problem, diagonal = "", moment.diagonal(dim1=-2, dim2=-1)
    if not bool(torch.isfinite(moment).all()):
        problem = "has entries that are not finite. Make it of keys that are, in float32 or float64"
    elif float((moment - moment.mT).abs().max()) > MAX_ASYMMETRY * float(moment.abs().max()):
        problem = "is not symmetric. Give the whole of E[k kᵀ], not a triangle or a factor of it"
    elif float(diagonal.min()) < 0 or not bool((diagonal.amax(-1) > 0).all()):
        problem = (
            f"has diagonal entries from {float(diagonal.min()):.3g} to "
            f"{float(diagonal.max()):.3g}, but a mean of squares is never negative, nor "
            "all of them 0. Give E[k kᵀ] of keys of the model"
        )
    if problem:
        raise ArtifactError(f"The second moment of layer {layer} {problem}.")
