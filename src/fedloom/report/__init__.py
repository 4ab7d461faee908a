"""What a run shows when it has ended: tables for a terminal, a page, a picture; all read off the run folder's files."""

from fedloom.report.page import page, picture, write_report
from fedloom.report.terminal import (
    advice_table,
    comparison_table,
    endpoints_table,
    measured_table,
    metrics_table,
    table,
)

__all__ = [
    "advice_table",
    "comparison_table",
    "endpoints_table",
    "measured_table",
    "metrics_table",
    "page",
    "picture",
    "table",
    "write_report",
]
