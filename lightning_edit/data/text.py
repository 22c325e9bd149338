# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Running text: what second moments are estimated from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from lightning_edit.checkpoints import PlainCheckpoints
from lightning_edit.core.errors import MissingDependencyError, RequestError

__all__ = ["TextDataModule"]


class TextDataModule(PlainCheckpoints, LightningDataModule):
    r"""Texts of a file or a hub data set, read only as far as they are asked for.

    A batch is a ``list[str]``.

    Args:
        path: A UTF-8 text file; each line that is not empty is a text.
        hub: Name of a data set on the Hugging Face hub, with ``@revision`` behind it to pin it, or
            a local folder; needs the extra ``data``.
        subset: Configuration of the hub data set, where it has several.
        split: Split of the hub data set.
        column: Column of the hub data set that holds the texts.
        batch_size: Texts in a batch.

    Raises:
        RequestError: If not exactly one source is given; when it is read, if the file does not
            exist or the data set has no such column of texts.
        MissingDependencyError: If a hub data set is asked for without the extra ``data``.

    Examples:
        >>> file = getfixture("tmp_path") / "text.txt"
        >>> _ = file.write_text("The first.\n\nThe second.\n")
        >>> list(TextDataModule(path=str(file)).train_dataloader())
        [['The first.', 'The second.']]
    """

    def __init__(
        self,
        path: str | None = None,
        hub: str | None = None,
        subset: str | None = None,
        split: str = "train",
        column: str = "text",
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        if (path is None) == (hub is None):
            raise RequestError(
                f"Texts come from `path` or from `hub`, but got path={path!r} and hub={hub!r}. "
                "Give one of them."
            )
        if batch_size < 1:
            raise RequestError(f"`batch_size` is expected to be at least 1, got {batch_size}.")
        self.path = path
        self.hub = hub
        self.subset = subset
        self.split = split
        self.column = column
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[str]:
        """The texts in their order."""
        return DataLoader(_Texts(self), self.batch_size, collate_fn=list)

    def texts(self) -> Iterator[str]:
        """Texts, one after another."""
        if self.path is not None:
            file = Path(self.path)
            if not file.is_file():
                raise RequestError(f"`path`: there is no text file `{self.path}`.")
            try:
                with file.open(encoding="utf-8") as stream:
                    yield from (line.strip() for line in stream if line.strip())
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(
                    f"`path`: `{self.path}` cannot be read as UTF-8 text ({error})."
                ) from None
            return
        for i, record in enumerate(self._rows(self.hub or "")):
            text = record.get(self.column)
            if not isinstance(text, str):
                raise RequestError(
                    f"{self.hub}[{i}]: `column` is {self.column!r}, which holds {text!r} and no "
                    f"text. Columns here: {', '.join(record)}."
                )
            if text.strip():
                yield text.strip()

    def _rows(self, hub: str) -> Iterable[Mapping[str, object]]:
        try:
            from datasets import load_dataset
        except ImportError:
            purpose = f"Reading the data set {hub!r} by its hub name"
            raise MissingDependencyError("datasets", "data", purpose) from None
        name, _, revision = hub.partition("@")
        rows: Iterable[Mapping[str, object]] = load_dataset(
            name, self.subset, split=self.split, revision=revision or None, streaming=True
        )
        return rows


class _Texts(IterableDataset[str]):
    """The texts of a data module as PyTorch's loader wants them."""

    def __init__(self, source: TextDataModule) -> None:
        self.source = source

    def __iter__(self) -> Iterator[str]:
        return self.source.texts()
