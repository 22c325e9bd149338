# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a run came to: as data, as files, as a page for people and as tables for papers."""

from lightning_edit.report.card import render_card
from lightning_edit.report.files import read_report, write_results
from lightning_edit.report.markdown import render_markdown
from lightning_edit.report.page import render_html
from lightning_edit.report.results import EditRow, MetricRow, ProbeRow, RunReport
from lightning_edit.report.summary import headline
from lightning_edit.report.table import metrics_table

__all__ = [
    "EditRow",
    "MetricRow",
    "ProbeRow",
    "RunReport",
    "headline",
    "metrics_table",
    "read_report",
    "render_card",
    "render_html",
    "render_markdown",
    "write_results",
]
