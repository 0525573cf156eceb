"""Text renderings of a bundle's JSON: the summary that `inspect` prints, the card of an imported model, title and tables of any card."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from ebjdat_serve.bundle import Bundle, network_name
from ebjdat_serve.errors import visible
from ebjdat_serve.manifest import YES, Calibration, Manifest
from ebjdat_serve.rows import FRESH, PRIOR, Row, first, rows_where
from ebjdat_serve.scores import SCORES, uncalibrated
from ebjdat_serve.sentences import data_words, protocol_words, sampler_words
from ebjdat_serve.store import reason_held_back

log = logging.getLogger("ebjdat_serve")
NAMED = 20
"""Labels that are named."""
LONGEST_LINE = 2000
"""Characters of a line of a summary: what a strange manifest says is cut there."""


def summary(bundle: Bundle) -> str:
    """Return the summary that `ebjdat-serve inspect` prints."""
    m, p, s = bundle.manifest, bundle.manifest.provenance, bundle.manifest.sampler
    lines = [
        f"{m.name}@{m.version}",
        f"  path          {bundle.path}",
        f"  architecture  {network_name(m.architecture)}, input {m.input.described()}",
        f"  labels        {label_words(m)}",
        f"  sampler       {s.steps} steps of {s.step_size}, gradient clip {s.grad_clip}, noise {s.noise_std}",
        f"  trained       preset {p.preset}, seed {p.seed}, {p.dataset}, git {p.git[:12]}, {p.started}",
        f"  steps         {p.steps} of {p.planned_steps} planned, rolled back {p.rollbacks} times",
    ]
    reasons = [f"no {name}: {why}" for name, why in vars(m.capabilities).items() if why != YES]
    lines += [f"  capable       {'; '.join(reasons) or 'of energy, gradient and generation'}"]
    if m.prior:
        lines.append(f"  prior         {prior_words(m)}")
    lines += [f"  licence       {', '.join(f'{what} {name}' for what, name in vars(m.licence).items())}"]
    if reason := reason_held_back(bundle.path):
        lines.append(f"  candidate     held back, not served: {reason}")
    if not bundle.calibrated:
        lines.append("  calibration   none: no p-values and no flag (ebjdat-serve calibrate)")
    else:
        c = bundle.calibration()
        lines.append(
            f"  calibration   n = {len(c.scores)} ({c.dataset}), temperature {c.temperature:.3f}, {c.precision}, views {', '.join(c.views)}"
        )
    lines += [f"  recorded      {name}: {one.precision}, {one.dataset}, made {one.made}" for name, one in bundle.recorded().items()]
    lines.append("  files")
    lines += [f"    {name:24}{entry.bytes:>10} bytes  sha256 {entry.sha256[:16]}" for name, entry in m.files.items()]
    rows = bundle.metrics()
    if rows:
        lines.append("  metrics")
        lines += [f"    {row.metric:32}{figure(row):>24}  n = {row.n:<6} {data_words(row)}: {protocol_words(row)}" for row in rows]
    return "\n".join(
        visible(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} … ({len(line):,} characters)") for line in lines
    )


def label_words(manifest: Manifest) -> str:
    """Return the labels, of many the first and how many more."""
    more = len(manifest.labels) - NAMED
    return ", ".join(manifest.labels[:NAMED]) + (f" and {more} more" if more > 0 else "")


def score_words(manifest: Manifest, calibration: Calibration | None) -> str:
    """Return what the OOD score is, and what can be decided by it."""
    if calibration:
        return f"the sum of the views {', '.join(calibration.views)}, calibrated on {len(calibration.scores)} images"
    equation = SCORES[uncalibrated(energy=manifest.capabilities.energy == YES)].equation
    return f"{equation}: not calibrated, so it ranks images and has no p-value and no threshold"


def prior_words(manifest: Manifest) -> str:
    """Return what the prior of a folder is of."""
    assert manifest.prior
    return f"class Gaussians of {len(manifest.drawn)} of {len(manifest.labels)} classes, fitted to {manifest.prior.dataset}"


def agreement_words(rows: list[Row]) -> str:
    """Return how often the model labels what it draws as asked, "" where that was not measured."""
    fresh, (start, *_) = rows_where(rows, "class_agreement_own", dataset=FRESH), [first(rows, "class_agreement_own", dataset=PRIOR), None]
    if not fresh or start is None:
        return ""
    whole, *others = sorted(fresh, key=lambda row: -(row.steps or 0))
    after = "".join(f"; {row.value:.3f} after {row.steps} steps" for row in others)
    return (
        f"class agreement {figure(whole)}: the share of {whole.n} images that the model labels as asked, after {sampler_words(whole)}, "
        f"seed {whole.seed}{after}; {start.value:.3f} of the prior alone"
    )


def title(manifest: Manifest) -> str:
    """Return the title line of a bundle's card."""
    return f"# {manifest.name}@{manifest.version}\n"


def retitled(bundle: Bundle, version: str) -> Bundle:
    """Set the bundle's ``version``, in the manifest and in the title of its card."""
    before, done = title(bundle.manifest), bundle.update(version=version)
    file = bundle.path / "README.md"
    text = file.read_text(encoding="utf-8") if "README.md" in bundle.manifest.files else ""
    if not text.startswith(before):
        return done
    file.write_text(title(done.manifest) + text.removeprefix(before), encoding="utf-8")
    return done.update("README.md")


def write_card(bundle: Bundle) -> Bundle:
    """Write README.md, the card of an imported model, and return the bundle with it; it needs no figures and shows those there are."""
    text = f"{imported_card(bundle)}\n{measured(bundle.metrics())}"
    (bundle.path / "README.md").write_text(text, encoding="utf-8")
    return bundle.update("README.md")


def renewed(bundle: Bundle, lacks: str = "describes the calibration before this one") -> Bundle:
    """Return the bundle with its card written again after a calibration; one of training's is left, and what it ``lacks`` is said."""
    if bundle.manifest.imported:
        return write_card(bundle)
    if "README.md" in bundle.manifest.files:
        log.warning("README.md %s; python training/card.py %s writes it again", lacks, bundle.path)
    return bundle


def measured(rows: list[Row]) -> str:
    """Return the card's section on figures."""
    return f"## Measured\n\n{table(rows)}\n" if rows else "Nothing was measured on it here: python training/evaluate.py does that.\n"


def imported_card(bundle: Bundle) -> str:
    """Return what the card of an imported model says without figures: input, capabilities with reasons, calibration, licences."""
    m, p = bundle.manifest, bundle.manifest.provenance
    size = f"{m.input.height} x {m.input.width} pixels"
    names = label_words(m)
    contract = {name: value for name, value in vars(m.input).items() if name not in ("height", "width")}
    calibration = bundle.calibration() if bundle.calibrated else None
    return f"""{title(m)}
{network_name(m.architecture)}, trained elsewhere ({p.configuration.get("source", p.dataset)}), imported {p.started}.
It takes {size} and gives {m.output} of {len(m.labels)} classes: {names}.

## Input

An image of any size becomes RGB of {size}, in [0,1]; what the network was trained behind beyond that is part of its graph.

| resize and crop | |
|---|---|
{lines(contract)}

## What it can do

| | |
|---|---|
{lines(vars(m.capabilities))}

## Is it like the data?

The OOD score is {score_words(m, calibration)}.
{calibrated_words(calibration)}
{recorded_words(bundle)}{drawn_words(bundle)}
## Licences

| | |
|---|---|
{lines(vars(m.licence))}
{noted("What the import found", p.configuration.get("found"))}{noted("What it could not know", p.configuration.get("unknown"))}"""


def drawn_words(bundle: Bundle) -> str:
    """Return the card's section on what is drawn, or nothing where it draws nothing."""
    m = bundle.manifest
    if not m.prior or not (agreement := agreement_words(bundle.metrics())):
        return ""
    return f"""
## What it draws

Chains start from {prior_words(m)}; of the other classes nothing is drawn.
By the model's own judgement alone, {agreement}. A network that was not trained for robustness labels
noise as asked: agreement says that chains follow its score, not that a person sees the class.
"""


def noted(heading: str, said: object) -> str:
    """Return a section of the card with what an import noted, or nothing."""
    items = "".join(f"- {visible(str(one))}\n" for one in said) if isinstance(said, list) else ""
    return f"\n## {heading}\n\n{items}" if items else ""


def calibrated_words(c: Calibration | None) -> str:
    """Return the card's sentences on what p-values speak of."""
    if c is None:
        nothing = "Answers have no p-value, no flag and no decision, and no threshold is guessed"
        return f"{nothing}: `ebjdat-serve calibrate BUNDLE DIR` calibrates it."
    out = "".join(f"\nWithout the view {name}: {why}." for name, why in c.left_out.items())
    handled = f", of which {c.handled:.0%} were lightly handled: recompressed, resized or the like" if c.handled else ""
    return f"P-values speak of images like {c.dataset}{handled}. The temperature of p(y|x) is {c.temperature:.3g}.{out}"


def recorded_words(bundle: Bundle) -> str:
    """Return the card's sentences on calibrations by recorded scores, "" without any."""
    return "".join(
        f"With `serve --calibration {name}`, in {one.precision}, p-values {one.guarantee}; made {one.made[:10]}.\n"
        for name, one in bundle.recorded().items()
    )


def lines(values: Mapping[str, object]) -> str:
    """Return rows of a Markdown table with two columns."""
    return "\n".join(f"| {name} | {visible(str(value)).replace('|', chr(92) + '|')} |" for name, value in values.items())


def figure(row: Row) -> str:
    """Return a value with its interval or standard error, as text."""
    text = f"{row.value:.4g}"
    if row.interval is not None:
        low, high = (0.0 if abs(bound) < 1e-9 else bound for bound in row.interval)
        text += f" [{low:.3g}, {high:.3g}]"
    elif row.stderr is not None:
        text += f" ± {row.stderr:.2g}"
    return text


WARM_START = "warm start"


@dataclass(frozen=True)
class Baseline:
    """The figures of the network that a card compares with: the warm start, or a control trained for as long without the energies."""

    title: str = WARM_START
    rows: list[Row] = field(default_factory=list)


UNCOMPARED = Baseline()
BASELINES = {"baseline.json": WARM_START, "control.json": "control"}
"""Titles of a baseline by the file of the bundle that holds it."""


def table(rows: list[Row], baseline: Baseline = UNCOMPARED) -> str:
    """Return a Markdown table of ``rows``, with a column for the baseline's measurements if there are any."""
    known = {key(row): row for row in baseline.rows}
    paired = any(key(row) in known for row in rows)
    names = ["figure", "this model", *([baseline.title] if paired else []), "n", "data", "protocol"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        reference = known.get(key(row))
        other = [figure(reference) if reference else ""] if paired else []
        cells = (row.metric, figure(row), *other, row.n, data_words(row), f"{protocol_words(row)}; seed {row.seed}".removeprefix("; "))
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def key(row: Row) -> tuple[str, int]:
    """Return the key that two models' rows of the same measurement and n share."""
    return row.key, row.n
