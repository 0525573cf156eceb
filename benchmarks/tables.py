#!/usr/bin/env python3
"""Generate the tables of docs/serving.md and docs/evaluation.md from the benchmarks' JSON files: `python benchmarks/tables.py`."""

import json
from pathlib import Path
from typing import Any

from ebjdat_serve.rows import KINDS, parse_row
from ebjdat_serve.sentences import protocol_words
from ebjdat_serve.server import settings
from training.compare import markdown, read

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
MODELS = ("standard", "pgd-at", "sada-jem", "ebjdat")
Row = dict[str, Any]


def main() -> None:
    """Rewrite the documents."""
    for name, write in (("serving.md", serving), ("evaluation.md", evaluation)):
        (DOCS / name).write_text(write((DOCS / name).read_text(encoding="utf-8")), encoding="utf-8")


def serving(text: str) -> str:
    """Return ``text`` with the generated tables of the load tests and the settings."""
    text = placed(text, "settings", settings.table())
    for name in ("classify_load", "generate_load", "shares", "hostile_load"):
        text = placed(text, name.removesuffix("_load"), table(json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))))
    return text


def evaluation(text: str) -> str:
    """Return ``text`` with the generated tables of public_nets.json, crosscheck.json and the comparison of the kept models."""
    public: list[Row] = json.loads((HERE / "public_nets.json").read_text(encoding="utf-8"))
    rows = [
        f"| {row['name']} | {row['value']:.4f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}] | {row['n']} | {public_protocol(row)} |"
        for row in public
    ]
    text = placed(text, "public", "\n".join(["| | value | n | protocol |", "|---|---|---|---|", *rows]))
    checked: list[Row] = json.loads((HERE / "crosscheck.json").read_text(encoding="utf-8"))
    rows = [f"| {row['name']} | {row['ours']:.6f} | {row['value']:.6f} | {row['n']} |" for row in checked]
    text = placed(text, "crosscheck", "\n".join(["| | ours | theirs | n |", "|---|---|---|---|", *rows]))
    return placed(text, "comparison", markdown([read(HERE / "models" / name) for name in MODELS]))


def public_protocol(row: Row) -> str:
    """Return the protocol of a public network's figure; the first n test images are attacked."""
    said = protocol_words(parse_row({name: value for name, value in row.items() if name in KINDS}, row["name"]))
    by = f", by {row['implementation']}" if "implementation" in row else ""
    known = f"; known: at most {row['known_at_most']}" if "known_at_most" in row else ""
    return f"{said}{by}, first {row['n']}{known}"


def placed(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between its markers."""
    before, _, rest = text.partition(f"<!-- {name} -->")
    _, _, after = rest.partition(f"<!-- /{name} -->")
    return f"{before}<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->{after}"


def table(rows: list[Row]) -> str:
    """Return the rows as a table, in their order."""
    lines = [f"| {row['name']} | {number(row)} | {row['unit']} |" for row in rows]
    return "\n".join(["| | value | unit |", "|---|---|---|", *lines])


def number(row: Row) -> str:
    """Return a value as text: shares and ratios with two decimals, others with four digits."""
    return f"{row['value']:.2f}" if not row["unit"] else f"{row['value']:.4g}"


if __name__ == "__main__":
    main()
