"""What a comparison is shown as: tables, plots for a slide, pros and cons, and one page that needs no server."""

from inlay.study.report.save import read_comparisons, save_comparison
from inlay.study.report.table import write_csv_table, write_markdown_table, write_terminal_table

__all__ = [
    "read_comparisons",
    "save_comparison",
    "write_csv_table",
    "write_markdown_table",
    "write_terminal_table",
]
