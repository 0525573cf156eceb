#!/usr/bin/env python3
"""Generate the tables of docs/serving.md, evaluation.md and drift.md from the benchmarks' JSON files: `python benchmarks/tables.py`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.serve_224 import ONE, OURS, PLAIN, STOCK
from ebjdat_serve.rows import KINDS, Images, first, parse_row, rows_where
from ebjdat_serve.rows import Row as Figure
from ebjdat_serve.sentences import attack_name, eps_name, protocol_words, set_name
from ebjdat_serve.server import settings
from training.compare import markdown, read

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
MODELS = ("standard", "pgd-at", "sada-jem", "ebjdat")
Row = dict[str, Any]


def main() -> None:
    """Rewrite the documents."""
    for name, write in (("serving.md", serving), ("evaluation.md", evaluation), ("drift.md", drift)):
        (DOCS / name).write_text(write((DOCS / name).read_text(encoding="utf-8")), encoding="utf-8")


def serving(text: str) -> str:
    """Return ``text`` with the generated tables of the load tests and the settings."""
    text = placed(text, "settings", settings.table())
    for name in ("classify_load", "generate_load", "shares", "hostile_load"):
        text = placed(text, name.removesuffix("_load"), table(json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))))
    return placed(text, "serve_224", at_224(json.loads((HERE / "serve_224.json").read_text(encoding="utf-8"))))


def at_224(rows: list[Row]) -> str:
    """Return rates and least processor times of each contestant, and what they make of the server's; none where one was not measured."""
    found, lines = {row["name"]: row for row in rows}, []
    for what in dict.fromkeys(row["name"].split(": ")[0] for row in rows):
        about, cells = (
            found[f"{what}: {OURS}"],
            dict.fromkeys((OURS, ONE, PLAIN, STOCK, *(f"{OURS} / {name}" for name in (ONE, PLAIN, STOCK))), ""),
        )
        costs = {
            name: row["least"] for name in (OURS, ONE, PLAIN, STOCK) if (row := found.get(f"{what}: {name}, processor time of an image"))
        }
        for name, cost in costs.items():
            cells[name] = f"{found[f'{what}: {name}']['value']:.3g}, {cost:.1f} ms"
            if ratio := found.get(f"{what}: ratio {OURS} / {name}"):
                low, high = ratio["range"]
                cells[f"{OURS} / {name}"] = f"{ratio['value']:.2f} [{low:.2f}, {high:.2f}], {cost / costs[OURS]:.2f}"
        lines.append({"": what, "rounds": f"{about['n']}", "load": f"{about['load_average']:.0f}", **cells})
    return pivot(list(lines[0]), [list(line.values()) for line in lines])


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
    within = [parsed(row) for row in json.loads((HERE / "reach.json").read_text(encoding="utf-8"))]
    text = placed(text, "reach", "\n\n".join([separation(within), review(within), coverage(within), rejection(within)]))
    return placed(text, "comparison", markdown([read(HERE / "models" / name) for name in MODELS]))


def drift(text: str) -> str:
    """Return ``text`` with the tables of drift.json."""
    rows: list[Row] = json.loads((HERE / "drift.json").read_text(encoding="utf-8"))
    alarms = [row for row in rows if row["unit"] == "draws"]
    lines = [
        f"| {row['test']} | {row['level']:g} | {row['calibration_n']:,} | {row['requests']:,} | {row['value']} of {row['n']:,} |"
        for row in alarms
    ]
    text = placed(text, "alarms", "\n".join(["| test | level | n | clean requests | false alarms |", "|---|---|---|---|---|", *lines]))
    head = ["| traffic | test | level | n | median delay | 9 of 10 within | found |", "|---|---|---|---|---|---|---|"]
    simulated = [f"| {row['shift_sd']:g} sd higher after {row['change']:,} {delay(row)}" for row in rows if "shift_sd" in row]
    text = placed(text, "delays", "\n".join([*head, *simulated]))
    head[0] = head[0].replace("traffic |", "traffic | images | flagged |")
    real = [f"| {row['set']} | {row['n']:,} | {row['flagged']:.3f} {delay(row)}" for row in rows if "set" in row]
    text = placed(text, "traffic", "\n".join([head[0], f"|---|---{head[1]}", *real]))
    return placed(text, "own_traffic", own_traffic(json.loads((HERE / "own_traffic.json").read_text(encoding="utf-8"))))


def own_traffic(rows: list[Row]) -> str:
    """Return the shares flagged by both calibrations, of each kind of traffic and images."""
    found = {(row["traffic"], row["images"], row["by"]): row for row in rows}
    lines = []
    for traffic, images in dict.fromkeys((row["traffic"], row["images"]) for row in rows):
        both = [found[traffic, images, by] for by in ("images", "recorded scores")]
        shares = ["{:.3f} [{:.3f}, {:.3f}]".format(row["value"], *row["interval"]) for row in both]
        expected = both[1]["expected"]
        lines.append([traffic, images, str(both[1]["n"]), *shares, "[{:.3f}, {:.3f}]".format(*expected) if expected else ""])
    return pivot(["period", "images", "n", "by the calibration on images", "by the recorded scores", "expected of these"], lines)


def delay(row: Row) -> str:
    """Return the columns of a delay."""
    times = " | ".join("never" if row[name] is None else f"{row[name]:,.0f}" for name in ("value", "q90"))
    return f"| {row['test']} | {row['level']:g} | {row['calibration_n']:,} | {times} | {row['found']:.2f} |"


def public_protocol(row: Row) -> str:
    """Return the protocol of a public network's figure; the first n test images are attacked."""
    said = protocol_words(parsed(row))
    by = f", by {row['implementation']}" if "implementation" in row else ""
    known = f"; known: at most {row['known_at_most']}" if "known_at_most" in row else ""
    return f"{said}{by}, first {row['n']}{known}"


def parsed(row: Row) -> Figure:
    """Return the fields of metrics.json of a benchmark's row."""
    return parse_row({name: value for name, value in row.items() if name in KINDS}, row["name"])


def pivot(header: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def scores_of(rows: list[Figure], metric: str) -> list[str]:
    """Return the scores that a metric was measured of, in order."""
    return list(dict.fromkeys(row.score or "" for row in rows_where(rows, metric)))


def cell(rows: list[Figure], metric: str, images: Images, **wanted: Any) -> str:
    """Return the value of a metric of some images as text."""
    found = first(rows, metric, images=images, **wanted)
    return f"{found.value:.3f}" if found else ""


def separation(rows: list[Figure]) -> str:
    """Return AUROC of fooled images against all clean images | against those classified right, and power at alpha .05 of each score."""
    scores = scores_of(rows, "reach_auroc")
    lines = []
    for images in dict.fromkeys(row.images for row in rows_where(rows, "reach_auroc")):
        success = first(rows, "attack_success", images=replace(images, subset=None))
        assert success is not None
        name = f"{attack_name(images)} {eps_name(images.eps or 0.0)}, {round(success.value * success.n)} fooled of {success.n}"
        pairs = ((cell(rows, "reach_auroc", images, score=s), cell(rows, "reach_auroc_right", images, score=s)) for s in scores)
        lines.append([name, "AUROC", *(f"{every} \\| {right}" for every, right in pairs)])
        powers = {s: cell(rows, "reach_power", images, score=s) for s in scores}
        clean = first(rows, "unstable", attack=None)
        powers["unstable"] = f"{cell(rows, 'unstable', images)} (clean {clean.value:.3f})" if clean else ""
        lines.append(["", "power", *powers.values()])
    return pivot(["images", "", *scores], lines)


def review(rows: list[Figure]) -> str:
    """Return the share of images that each policy sends to review."""
    policies = list(dict.fromkeys(row.views or () for row in rows_where(rows, "review_share")))
    lines = []
    for images, alpha in dict.fromkeys((row.images, row.alpha) for row in rows_where(rows, "review_share")):
        found = [first(rows, "review_share", images=images, alpha=alpha, views=views) for views in policies]
        texts = [
            f"{row.value:.3f}" + (" in [{:.3f}, {:.3f}]".format(*row.expected) if row.expected else "") if row else "" for row in found
        ]
        n = next(row.n for row in found if row)
        lines.append([f"{alpha:g}", f"{set_name(images)}, n = {n}", *texts])
    return pivot(["share asked for", "images", *(" + ".join(views) for views in policies)], lines)


def coverage(rows: list[Figure]) -> str:
    """Return the area under the risk-coverage curve of each score."""
    scores = scores_of(rows, "aurc")
    sets = [(row.images, row) for row in rows_where(rows, "error")]
    lines = [
        [f"{set_name(images)}, n = {row.n}", f"{row.value:.3f}", *(cell(rows, "aurc", images, score=score) for score in scores)]
        for images, row in sets
    ]
    return pivot(["images", "error", *scores], lines)


def rejection(rows: list[Figure]) -> str:
    """Return robust accuracy with rejection by radius, beside robust accuracy at eps less the radius and what clean images pay."""
    metrics = ("accuracy_with_search", "accuracy_less_radius", "clean_rejected", "accuracy_accepted")
    lines = []
    for radius in sorted({row.radius or 0.0 for row in rows_where(rows, "accuracy_with_search")}):
        found = [first(rows, metric, radius=radius) for metric in metrics]
        lines.append([eps_name(radius), *(f"{row.value:.3f} of {row.n}" if row else "" for row in found)])
    words = (
        "robust accuracy with rejection",
        "robust accuracy at eps - radius",
        "clean images rejected",
        "accuracy of accepted clean images",
    )
    return pivot(["search radius", *words], lines)


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
