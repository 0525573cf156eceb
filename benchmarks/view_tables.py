"""Tables of the figures of benchmarks/views.py, as docs/decisions/0025-views.md shows them."""

from benchmarks.tables import placed
from benchmarks.view_candidates import CANDIDATES, CLOSELY, LARGEST, SUMS
from benchmarks.view_figures import CHOSEN, MODES, Row
from benchmarks.view_images import BENIGN, BLURRED
from ebjdat_serve.views import DEFAULT_VIEWS

SHORT = {
    "ood/svhn_train_first1080": "SVHN",
    "ood/cifar100_test_3000": "CIFAR-100",
    "ood/imagenet_500": "ImageNet",
    "ood/interpolations": "interpolations",
    "ood/test turned by 90 degrees": "turned 90°",
    "ood/test inverted": "inverted",
}
Key = tuple[str, str, str, str]


def tables(rows: list[Row]) -> dict[str, str]:
    """Return the tables of the decision by their markers."""
    by_precision: dict[str, dict[Key, Row]] = {}
    for r in rows:
        if "mode" in r and "view" not in r:
            by_precision.setdefault(r["precision"], {})[r["metric"], r["set"], r["score"], r["mode"]] = r
    rows, found = [r for r in rows if r["precision"] == "fp32"], by_precision["fp32"]
    return {
        "ablation": ablation(found),
        "choice": choice_table(found),
        "odd": odd_table(found),
        "benign": benign_table(found),
        "cost": cost_table(rows),
        "why": why_table(rows),
        "precisions": precision_table(by_precision),
        "paired": paired_table(found),
    }


def table(head: list[str], body: list[list[str]]) -> str:
    """Return a markdown table."""
    return "\n".join("| " + " | ".join(each) + " |" for each in [head, ["---"] * len(head), *body])


def both(found: dict[Key, Row], where: str, title: str, mode: str) -> str:
    """Return AUROC / power as text."""
    area, power = (found[metric, where, title, mode]["value"] for metric in ("AUROC", "power"))
    return f"{area:.3f} / {power:.2f}"


def least_odd(found: dict[Key, Row], title: str, mode: str) -> float:
    """Return the least power on an odd set."""
    return min(
        float(r["value"])
        for (metric, where, *by), r in found.items()
        if metric == "power" and where.startswith("odd/") and by == [title, mode]
    )


def ablation(found: dict[Key, Row]) -> str:
    """Return AUROC / power of every view and sum on test images, calibrated in the chosen way."""
    body = []
    for title in (*SUMS, LARGEST):
        cells = [f"**{title}**" if title == "sum" else title]
        cells += [both(found, where, title, CHOSEN) for where in SHORT]
        body.append([*cells, f"{least_odd(found, title, CHOSEN):.3f}"])
    return table(["score", *SHORT.values(), "least power on an odd set"], body)


def choice_table(found: dict[Key, Row]) -> str:
    """Return what sums were chosen by: proxies and benign flag rates on the selection split, and odd images, which are made."""
    body = []
    for title in (*SUMS, LARGEST):
        if len(SUMS.get(title, DEFAULT_VIEWS)) == 1:
            continue
        for mode in MODES if title in CLOSELY else (CHOSEN,):
            rates = [found["flag rate", f"benign selection/{name}", title, mode]["value"] for name in BENIGN]
            blurred = max(rate for name, rate in zip(BENIGN, rates, strict=True) if name in BLURRED)
            other = max(rate for name, rate in zip(BENIGN, rates, strict=True) if name not in BLURRED)
            cells = [title, mode, both(found, "mean of proxies", title, mode), f"{other:.3f}", f"{blurred:.3f}"]
            body.append([*cells, f"{least_odd(found, title, mode):.3f}"])
    head = ["sum", "calibration", "proxies", "largest benign rate (bar .08)", "of the two blurs (bar .12)", "least odd power (bar .95)"]
    return table(head, body)


def odd_table(found: dict[Key, Row]) -> str:
    """Return the power on every odd set."""
    titles = ("max_softmax", "logits", "features", "statistics", "sum")
    sets = [
        where for (metric, where, score, mode) in found if (metric, score, mode) == ("power", "sum", CHOSEN) and where.startswith("odd/")
    ]
    body = [
        [where.removeprefix("odd/"), str(found["power", where, "sum", CHOSEN]["n"])]
        + [f"{found['power', where, title, CHOSEN]['value']:.3f}" for title in titles]
        for where in sets
    ]
    return table(["set", "n", *titles], body)


def benign_table(found: dict[Key, Row]) -> str:
    """Return flag rates of clean and of benignly shifted test images, and separation, by how the sum is calibrated."""
    body = []
    for title in CLOSELY:
        for mode in MODES:
            kind = MODES[mode].calibrated
            own, clean = found["flag rate", f"{kind}/test", title, mode], found["flag rate", "clean/test", title, mode]
            low, high = own["expected"]
            cells = [title, mode, f"{clean['value']:.3f}", f"{own['value']:.3f} [{low:.3f}, {high:.3f}]"]
            cells += [f"{found['flag rate', f'benign/{name}', title, mode]['value']:.3f}" for name in BENIGN]
            body.append(cells + [both(found, where, title, mode) for where in list(SHORT)[:3]])
    return table(["score", "calibration", "clean", "what it is calibrated on [99 %]", *BENIGN, *list(SHORT.values())[:3]], body)


def cost_table(rows: list[Row]) -> str:
    """Return ms an image and bytes of every view."""
    cost = {(r["metric"], r["score"], r.get("batch")): r for r in rows if r["metric"] in ("ms", "bytes")}
    body = []
    for name in ("classify graph", *CANDIDATES):
        ms = [cost["ms", name, batch] for batch in (1, 32)]
        kept = f"{cost['bytes', name, None]['value']:,}" if ("bytes", name, None) in cost else ""
        body.append([name, kept, *(f"{r['value']:.3f} ({r['ratio_to_classify']:.3f})" for r in ms)])
    return table(["view", "bytes", "ms an image, batch 1 (of classify)", "batch 32"], body)


def why_table(rows: list[Row]) -> str:
    """Return which view spoke of the flagged images of each set."""
    found = {(r["set"], r["view"]): r for r in rows if r.get("view") and r["mode"] == CHOSEN}
    sets = list(dict.fromkeys(where for where, _ in found))
    names = list(dict.fromkeys(name for _, name in found))
    body = [[where, str(found[where, names[0]]["n"]), *(f"{found[where, name]['value']:.2f}" for name in names)] for where in sets]
    return table(["set", "flagged", *names], body)


def precision_table(by_precision: dict[str, dict[Key, Row]]) -> str:
    """Return the figures of the sum in each precision."""
    body = []
    for precision, found in by_precision.items():
        cells = [precision, f"{found['flag rate', 'clean/test', 'sum', CHOSEN]['value']:.3f}", f"{least_odd(found, 'sum', CHOSEN):.3f}"]
        cells += [both(found, where, "sum", CHOSEN) for where in list(SHORT)[:3]]
        body.append(cells + [f"{found['flag rate', f'benign/{name}', 'sum', CHOSEN]['value']:.3f}" for name in BENIGN])
    return table(["precision", "clean", "least power on an odd set", *list(SHORT.values())[:3], *BENIGN], body)


def paired_table(found: dict[Key, Row]) -> str:
    """Return by how much the sum's AUROC is above that of max softmax."""
    metric = "AUROC less max softmax"
    body = [
        [name, f"{r['value']:+.3f}", f"{r['stderr']:.3f}"] for where, name in SHORT.items() for r in [found[metric, where, "sum", CHOSEN]]
    ]
    return table(["set", metric, "standard error, paired"], body)


def document(text: str, rows: list[Row]) -> str:
    """Return ``text`` with the tables of ``rows``."""
    for name, content in tables(rows).items():
        text = placed(text, name, content)
    return text
