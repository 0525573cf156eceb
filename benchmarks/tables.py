#!/usr/bin/env python3
"""Write the tables of docs/serving.md from the JSON files they come from: `python benchmarks/tables.py`."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "serving.md"
Row = dict[str, Any]


def main() -> None:
    """Rewrite the document."""
    DOCUMENT.write_text(document(DOCUMENT.read_text()))


def document(text: str) -> str:
    """Return ``text`` with the tables of classify_load.json and generate_load.json in their places."""
    for name in ("classify", "generate"):
        rows: list[Row] = json.loads((HERE / f"{name}_load.json").read_text())
        before, _, rest = text.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}<!-- {name} -->\n\n{table(rows)}\n\n<!-- /{name} -->{after}"
    return text


def table(rows: list[Row]) -> str:
    """Return the rows as a table, in their order."""
    lines = [f"| {row['name']} | {number(row)} | {row['unit']} |" for row in rows]
    return "\n".join(["| | value | unit |", "|---|---|---|", *lines])


def number(row: Row) -> str:
    """Return a value as it is printed: shares and ratios with two decimals, the rest with three digits."""
    return f"{row['value']:.2f}" if not row["unit"] else f"{row['value']:.4g}"


if __name__ == "__main__":
    main()
