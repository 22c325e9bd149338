# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Runs cells: an editor's own ``test`` in a Lightning Trainer, one model for all of them."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_edit.benchmark.cells import Cell, cells_of, digest, unedited_parts
from lightning_edit.benchmark.progress import without_remarks
from lightning_edit.benchmark.rows import CellRow, probe_rows
from lightning_edit.benchmark.specs import DataSpec, Study
from lightning_edit.benchmark.store import CellPart, CellRecord, ResultsFolder
from lightning_edit.benchmark.unedited import (
    UneditedRun,
    from_record,
    reversed_alone,
    to_record,
)
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import EditError
from lightning_edit.core.hashing import WeightHashes
from lightning_edit.core.provenance import utc_now
from lightning_edit.core.request import EditRequest, cases
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.loader import RequestLoader
from lightning_edit.evaluation.evaluator import Evaluation
from lightning_edit.evaluation.prose import perplexity, read_prose
from lightning_edit.models import load_model, load_tokenizer
from lightning_edit.modules.base import EditModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Engine", "Unedited"]

ROWS_AT_ONCE = 16  # requests whose probes are measured together
AT_ONCE = 5  # cases of a cell whose results are kept together, where they are apart
KNOWN_AT_ONCE = 64  # facts asked for at once, in search of those that the model knows


@dataclass(frozen=True)
class Unedited:
    """What the unedited model makes of a data set.

    Args:
        requests: The requests that are edited.
        evaluation: Its scores of their probes.
        perplexity: On the package's page of prose, where sequences of edits need it.
    """

    requests: list[EditRequest]
    evaluation: Evaluation
    perplexity: float | None


class Engine:
    """Runs the cells of a study on one copy of its model.

    Args:
        study: The study.
        folder: Where scores of the unedited model are kept.
    """

    def __init__(self, study: Study, folder: ResultsFolder) -> None:
        self.study = study
        self.folder = folder
        study.check()
        self._load()
        self.sha256 = self._hashes.combined()
        self.device = self._trainer().strategy.root_device.type
        self.cells = list(cells_of(study, self.sha256, self.device))
        #: Whether the process was asked to end while the last cell was ending by itself.
        self.is_told_to_stop = False
        self._unedited: dict[str, Unedited] = {}

    def _load(self) -> None:
        study = self.study
        self.model: PreTrainedModel = load_model(
            study.model, dtype=study.dtype, cache_dir=study.cache_dir
        )
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(
            study.model, cache_dir=study.cache_dir
        )
        self._hashes = WeightHashes(self.model)

    def unedited(self, data: DataSpec) -> Unedited:
        """The unedited model on a data set: measured once, and read from the folder from then on.

        Args:
            data: One of the study's.

        Raises:
            EditError: If the model knows none of the facts that it is to know.
        """
        if data.name in self._unedited:
            return self._unedited[data.name]
        name = f"unedited/{digest(unedited_parts(self.study, data, self.sha256))}.json"
        by_id = {request.id: request for request in data.source.requests}
        found = self.folder.read_json(name)
        reads_prose = any(one.name == "sequential" for one in self.study.protocols)
        if found is None or (reads_prose and found["ids"] and found["perplexity"] is None):
            requests = self._chosen(data)
            run = self._asked(requests, reads_prose=reads_prose)
            found = {
                "ids": [request.id for request in requests],
                "perplexity": run.perplexity,
                "scores": to_record(run.evaluation),
            }
            if self.is_first:
                self.folder.write_json(name, found)
        if not found["ids"]:
            named = sum(bool(request.target_old) for request in data.source.requests)
            raise EditError(
                f"The model {self.study.model!r} gives the old answer of none of the {named} facts "
                f"of {data.name!r} that name one. Set `known: false` to edit them nevertheless, or "
                "take other facts."
            )
        scores = cast("Mapping[str, Mapping[str, object]]", found)["scores"]
        self._unedited[data.name] = Unedited(
            [by_id[id_] for id_ in cast("Sequence[str]", found["ids"])],
            from_record(**scores),  # type: ignore[arg-type]
            cast("float | None", found["perplexity"]),
        )
        return self._unedited[data.name]

    def run(self, cell: Cell) -> tuple[CellRecord, list[CellRow]]:
        """Runs a cell and gives the model back bit for bit.

        Args:
            cell: One of the study's.

        Returns:
            What it came to, and its rows. Whatever fails is told in the record.
        """
        record = CellRecord(
            key=cell.key,
            status="done",
            method=cell.method,
            data=cell.data,
            protocol=cell.protocol.label,
            seed=cell.seed,
            made_of=cell.made_of,
            device=self.device,
        )
        rows: list[CellRow] = []
        try:
            [data] = [data for data in self.study.data if data.name == cell.data]
            rows = self._measured(cell, self.unedited(data), record)
        except Exception as error:  # a method of anybody's may fail in any way
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            self._is_as_before()
        record["created"] = utc_now()
        return record, rows

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        from lightning.pytorch.utilities import rank_zero_only

        return getattr(rank_zero_only, "rank", 0) == 0

    def _measured(self, cell: Cell, unedited: Unedited, record: CellRecord) -> list[CellRow]:
        apart = _shuffled(cases(unedited.requests), cell.seed)
        order = [request for case in apart for request in case]
        record["requests"] = len(order)
        size = cell.protocol.size
        # Where requests are apart, a cell of hours is not lost with its last minute.
        at_once = len(apart) if cell.protocol.name == "sequential" else -(-AT_ONCE // size) * size
        parts: list[CellPart] = []
        for start in range(0, len(apart), at_once):
            name = f"cells/{cell.key}.{start}.json"
            part = self.folder.read_part(name)
            if part is None:
                part = self._part(cell, apart[start : start + at_once], unedited)
                if not self._is_as_before():
                    raise EditError("The method left the model changed.")
                if self.is_first:
                    self.folder.write_json(name, part)
                if self.is_told_to_stop and start + at_once < len(apart):
                    raise SIGTERMException
            parts.append(part)
        rows = [row for part in parts for row in part["rows"]]
        place = {request.id: i for i, request in enumerate(order)}
        for row in rows:
            row["position"] = place[row["request_id"]]
        record |= {
            "failed": sum(part["failed"] for part in parts),
            "edit_seconds": sum(part["edit_seconds"] for part in parts),
            "peak_memory_bytes": max(
                (peak for part in parts if (peak := part["peak_memory_bytes"]) is not None),
                default=None,
            ),
            "perplexity_ratio": parts[-1]["perplexity_ratio"],
            "seconds": sum(part["seconds"] for part in parts),
        }
        return rows

    def _part(self, cell: Cell, apart: list[list[EditRequest]], unedited: Unedited) -> CellPart:
        """Edits with some cases of a cell, by an editor of their own, from the seed on."""
        began = time.perf_counter()
        order = [request for case in apart for request in case]
        seed_everything(cell.seed, verbose=False)
        study, protocol = self.study, cell.protocol
        resolved = study.resolved[cell.method]
        settings = {
            "model": study.model,
            "cache_dir": study.cache_dir,
            **resolved.arguments,
            "dtype": study.dtype,
            "test_protocol": protocol.name,
            "max_new_tokens": study.max_new_tokens,
            "chat_template": study.chat_template,
            "system_prompt": study.system_prompt,
        }
        editor = resolved.cls(**settings)  # type: ignore[arg-type]
        editor.adopt(self.model, self.tokenizer)
        editor.unedited.know(unedited.evaluation)
        curve = _Curve(protocol.points, len(order), unedited)
        size = protocol.size
        if protocol.name == "sequential":
            # A curve is measured where a batch ends, and all of a batch together in the end.
            size = math.gcd(*protocol.points) or ROWS_AT_ONCE
        data = EditDataModule(requests=order, eval_batch_size=size)
        memory = _PeakMemory(self.device)
        gc.collect()  # a Trainer and its module hold each other, and all that they have made
        memory.begin()
        trainer = self._trainer([curve] if protocol.name == "sequential" else [])
        trainer.test(editor, datamodule=data, verbose=False)
        self.is_told_to_stop = trainer.received_sigterm
        measured = editor.measured.whole()
        if protocol.name == "sequential":
            held = dict.fromkeys((request.id for request in order), len(order))
        else:
            together = (apart[i - i % size :][:size] for i in range(0, len(apart), size))
            held = {
                r.id: sum(map(len, group)) for group in together for case in group for r in case
            }
        rows = probe_rows(cell.key, order, measured.before, measured.after, measured.figures, held)
        for point in sorted({made for made, _, _ in measured.between}):
            olds = [old for made, old, _ in measured.between if made == point]
            news = [new for made, _, new in measured.between if made == point]
            made_by_then = {probe.request_id: point for probe in news}
            rows += probe_rows(
                cell.key, order, olds, news, measured.figures, made_by_then, is_final=False
            )
        for point, scores in curve.found.items():
            so_far = order[:point]
            before = [p for request in so_far for p in unedited.evaluation.of(request.id)]
            held = dict.fromkeys((request.id for request in so_far), point)
            rows += probe_rows(
                cell.key, order, before, scores.probes, measured.figures, held, is_final=False
            )
        return CellPart(
            rows=rows,
            failed=sum("failed" in row for row in measured.figures),
            edit_seconds=sum(row.get("seconds", 0.0) for row in measured.figures),
            peak_memory_bytes=memory.most(),
            perplexity_ratio=curve.perplexity_ratio,
            seconds=time.perf_counter() - began,
        )

    def _is_as_before(self) -> bool:
        """Whether the model is what was loaded; loads it anew where it is not."""
        memory = EditMemory.find(self.model)
        if memory is not None:
            memory.detach_()
        if self._hashes.combined() == self.sha256:
            return True
        self._load()
        return False

    def _chosen(self, data: DataSpec) -> list[EditRequest]:
        """The requests of a data set that are edited."""
        found = cases(data.source.requests)
        if data.known:
            found = self._known(data, found)
        return [request for case in found[: data.limit] for request in case]

    def _known(self, data: DataSpec, found: Sequence[list[EditRequest]]) -> list[list[EditRequest]]:
        """The cases of which the model gives all old answers by itself."""
        asked = [case for case in found if all(request.target_old for request in case)]
        known: list[list[EditRequest]] = []
        step = KNOWN_AT_ONCE if data.limit else max(1, len(asked))
        for start in range(0, len(asked), step):
            part = asked[start : start + step]
            old = [reversed_alone(request) for case in part for request in case]
            scores = self._asked(old).evaluation
            hits = {p.request_id for p in scores.probes if p.autoregressive}
            known += [case for case in part if all(request.id in hits for request in case)]
            if data.limit and len(known) >= data.limit:
                break
        return known

    def _asked(self, requests: Sequence[EditRequest], *, reads_prose: bool = False) -> UneditedRun:
        max_length = getattr(self.model.config, "max_position_embeddings", None)
        is_encoder_decoder = bool(getattr(self.model.config, "is_encoder_decoder", False))
        tokens = PromptTokenizer(
            self.tokenizer,
            chat_template=self.study.chat_template,
            is_encoder_decoder=is_encoder_decoder,
            max_length=max_length,
            system_prompt=self.study.system_prompt,
        )
        run = UneditedRun(self.model, tokens, self.study.max_new_tokens, reads_prose=reads_prose)
        if not requests:  # of which a Trainer would warn
            return run
        trainer = self._trainer()
        loader = RequestLoader(requests, ROWS_AT_ONCE, trainer.world_size, trainer.global_rank)
        trainer.test(run, dataloaders=loader, verbose=False)
        if trainer.received_sigterm:  # which the Trainer looks at before its last batch alone
            raise SIGTERMException
        return run

    def _trainer(self, callbacks: Sequence[Callback] = ()) -> Trainer:
        study = self.study
        with without_remarks():
            return Trainer(
                accelerator=study.accelerator,
                devices=study.devices,
                strategy=study.strategy,
                precision=study.precision,
                callbacks=list(callbacks),
                default_root_dir=self.folder.path,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                # Edits need gradients.
                inference_mode=False,
            )


class _Curve(Callback):
    """Measures all edits so far after some numbers of them, and prose after the last.

    Args:
        points: Numbers of edits.
        total: Number of all edits, after which the protocol itself measures.
        unedited: What the unedited model makes of the data set.
    """

    def __init__(self, points: Sequence[int], total: int, unedited: Unedited) -> None:
        self.points, self.total = points, total
        self.unedited = unedited
        #: Number of edits to the scores of those so far.
        self.found: dict[int, Evaluation] = {}
        self.perplexity_ratio: float | None = None
        self._made: list[EditRequest] = []

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: list[EditRequest],
        *args: object,
    ) -> None:
        before, now = len(self._made), len(self._made) + len(batch)
        self._made += batch
        # A case that stands together may pass a point.
        is_point = now < self.total and any(before < point <= now for point in self.points)
        if is_point and isinstance(pl_module, EditModule):
            baseline = self.unedited.evaluation.baseline
            self.found[now] = pl_module.evaluator.evaluate(self._made, baseline)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the protocol puts the model back."""
        if isinstance(pl_module, EditModule):
            after = perplexity(pl_module.model, pl_module.tokens, read_prose())
            ratio = after / cast(float, self.unedited.perplexity)
            self.perplexity_ratio = ratio if math.isfinite(ratio) else None


class _PeakMemory:
    """Most memory that is held at a time, from a moment on.

    Of a GPU what torch holds there; else of the process, where the system tells and forgets it, as
    Linux does.

    Args:
        device: Type of the device.
    """

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self._began = False

    def begin(self) -> None:
        """Forgets what was before."""
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                self._began = True
            except OSError:  # a system that does not let it
                self._began = False

    def most(self) -> int | None:
        """Bytes; None where they are not known."""
        if self._is_cuda:
            return int(torch.cuda.max_memory_allocated())
        if not self._began:
            return None
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return 1024 * int(peak)


def _shuffled(found: Sequence[list[EditRequest]], seed: int) -> list[list[EditRequest]]:
    """Cases in the order that a seed draws."""
    generator = torch.Generator().manual_seed(seed)
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
