"""Tables as Markdown and CSV, safe for any text in a cell."""

import csv
import html
import io
import re
from collections.abc import Sequence
from typing import Any

from vitcls.analysis.page import visible


def plain(text: str) -> str:
    """Escapes text so that Markdown and HTML made of it show it unchanged, on one line."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(visible(text).replace("\n", " "), False))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, between empty lines."""
    lines = [head, ["---"] * len(head), *([plain(cell) for cell in row] for row in rows)]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def to_csv(rows: Sequence[Sequence[Any]]) -> str:
    """The rows as a CSV file's text; numbers unrounded, NaN empty."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerows([["" if cell != cell else cell for cell in row] for row in rows])  # NaN
    return file.getvalue()
