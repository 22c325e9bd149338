# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edit requests from files, from the literature's data sets, and from the package itself."""

from lightning_edit.data.base import EditDataModule
from lightning_edit.data.conflict_edit import ConflictEdit, conflict_from_record
from lightning_edit.data.counterfact import CounterFact, counterfact_from_record
from lightning_edit.data.facts import Facts
from lightning_edit.data.held_out import HeldOut
from lightning_edit.data.json import read_requests, write_requests
from lightning_edit.data.knowedit import KnowEdit, knowedit_from_record
from lightning_edit.data.known import Known1000, known_from_record
from lightning_edit.data.loader import RequestLoader, ResumableRequestLoader, requests_sha256
from lightning_edit.data.mquake import MQuAKE, mquake_from_record
from lightning_edit.data.old_new_pairs import OldNewPairs, old_new_pair_from_record
from lightning_edit.data.old_then_new import OldThenNew
from lightning_edit.data.qaedit import QAEdit, qaedit_from_record
from lightning_edit.data.text import TextDataModule
from lightning_edit.data.wikibigedit import WikiBigEdit, wikibigedit_from_record
from lightning_edit.data.zsre import ZsRE, zsre_from_record

__all__ = [
    "ConflictEdit",
    "CounterFact",
    "EditDataModule",
    "Facts",
    "HeldOut",
    "KnowEdit",
    "Known1000",
    "MQuAKE",
    "OldNewPairs",
    "OldThenNew",
    "QAEdit",
    "RequestLoader",
    "ResumableRequestLoader",
    "TextDataModule",
    "WikiBigEdit",
    "ZsRE",
    "conflict_from_record",
    "counterfact_from_record",
    "knowedit_from_record",
    "known_from_record",
    "mquake_from_record",
    "old_new_pair_from_record",
    "qaedit_from_record",
    "read_requests",
    "requests_sha256",
    "wikibigedit_from_record",
    "write_requests",
    "zsre_from_record",
]
