#!/usr/bin/env python3
"""Write the model card and its images from a bundle's JSON: `python training/card.py BUNDLE`.

The shipped bundle needs `--force`; `--readme README.md` also writes the README's generated sections. Nothing is typed by hand.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle, network_name, read_rows, write_rows
from ebjdat_serve.card import BASELINES, UNCOMPARED, WARM_START, Baseline, figure, imported_card, key, measured, table, title
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.editing import FORCED, edit
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import BundleError
from ebjdat_serve.generation import generate
from ebjdat_serve.rows import Images, Row, first, rows_where
from ebjdat_serve.scores import BASELINE
from ebjdat_serve.sentences import OBJECTIVES, attack_name, eps_name, set_name
from ebjdat_serve.sgld import Prior
from training.data.sources import SOURCES
from training.evaluation.chosen import ALPHA, chief, model_of, readme_rows, served_score, worse_than_chance
from training.evaluation.flag_text import Flagged, benign_limit, close_limit, flag_sentence, knowing_limit, odd_limit
from training.evaluation.rows import ball_of


def write_card(bundle: Bundle, rows: list[Row], baseline: Baseline, arrays: dict[Images, Any], *, samples: bool = True) -> list[str]:
    """Write README.md, landscape.png, samples.png if ``samples``, and the baseline's file if there is one; return their names.

    Raises BundleError for figures that were not measured on the bundle's files.
    """
    refuse_stale(bundle, rows)
    names = ["README.md"]
    if (
        samples and "step" in bundle.functions and not bundle.manifest.imported
    ):  # its card shows none: of 1000 classes they would take hours
        write_samples(bundle)
        names.append("samples.png")
    # without arrays an earlier image is kept as long as its rows are
    if not write_landscape(bundle, arrays) and not any(row.part == "landscape" for row in rows):
        (bundle.path / "landscape.png").unlink(missing_ok=True)
    if (bundle.path / "landscape.png").is_file():
        names.append("landscape.png")
    for name, kind in BASELINES.items():
        if baseline.rows and kind == baseline.title:
            write_rows(bundle.path / name, baseline.rows)
            names.append(name)
    (bundle.path / "README.md").write_text(card(bundle, rows, baseline), encoding="utf-8")
    return names


def renew_card(bundle: Bundle, rows: list[Row], baseline: Baseline, arrays: dict[Images, Any], *, samples: bool = True) -> Bundle:
    """Write the card and record its files in the manifest; remove an image that ``write_card`` deleted, and another kind of baseline."""
    names = write_card(bundle, rows, baseline, arrays, samples=samples)
    files = {name: entry for name, entry in bundle.manifest.files.items() if name not in ("landscape.png", *BASELINES)}
    done = Bundle(bundle.path, replace(bundle.manifest, files=files)).update(*names)
    return done.without(*(name for name in BASELINES if name not in names))


def refuse_stale(bundle: Bundle, rows: list[Row]) -> None:
    """Raise BundleError naming the first figure that was not measured on the bundle's files."""
    stale = [row for row in rows if not bundle.holds(row.of)]
    if stale:
        raise BundleError(
            f"{bundle.path / 'metrics.json'} is stale: {len(stale)} figures, {stale[0].metric} first, were measured on {stale[0].of[:12]}, "
            f"which the bundle does not hold; run python training/evaluate.py {bundle.path} --into {bundle.path}"
        )


def licence(dataset: str) -> str:
    """Return the licence of weights trained on a data set."""
    if dataset in SOURCES:
        return SOURCES[dataset].licence
    return f"The weights are yours; {dataset} is a folder of your own, and its licence is for you to state."


def write_samples(bundle: Bundle) -> None:
    """Write samples.png: one column per class, seeds from 0, not selected."""
    classes = len(bundle.manifest.labels)
    label = np.tile(np.arange(classes, dtype=np.int64), 6)
    samples = generate(
        load_engine(bundle, "auto", "cpu"), Prior.load(bundle.path / "prior.safetensors"), bundle.manifest.sampler, label, seed=0
    )
    (bundle.path / "samples.png").write_bytes(pixels.encode_png(pixels.grid(samples.image, 3, columns=classes), generated=True))


def write_landscape(bundle: Bundle, arrays: dict[Images, Any]) -> bool:
    """Write landscape.png: E(x) and E(x, y) of clean, adversarial, generated and OOD images; return False when not measured."""
    if not arrays:
        return False
    from training.evaluation.figures import landscape, png  # matplotlib takes a second

    eps = ball_of(bundle.manifest.provenance.dataset).linf
    (bundle.path / "landscape.png").write_bytes(png(landscape(arrays, eps), 110))
    return True


def card(bundle: Bundle, rows: list[Row], baseline: Baseline) -> str:
    """Return the model card."""
    if bundle.manifest.imported:
        return f"{imported_card(bundle)}\n{measured(rows)}"
    m, p = bundle.manifest, bundle.manifest.provenance
    drawn = (bundle.path / "landscape.png").is_file()
    landscape = "![energies of clean, adversarial, generated and OOD images](landscape.png)" if drawn else ""
    return f"""{title(m)}
{network_name(m.architecture)} on {p.dataset}, {m.input.height} x {m.input.width} pixels: {", ".join(m.labels)}.
Trained as `{p.preset}` by method {method_kind(bundle)} (the recipe is in bundle.json), seed {p.seed}, git {short(p.git)}, started {p.started}:
{p.steps} of {p.planned_steps} planned steps, rolled back for divergence {p.rollbacks} times. {about_mean(bundle)}Data sha256 {p.data_sha256[:16]}.

![samples: one column per class, seeds in order, not selected](samples.png)

Generation is short-run conditional sampling ({m.sampler.steps} steps of {m.sampler.step_size}, gradient clip {m.sampler.grad_clip}, noise {m.sampler.noise_std}) from a
class Gaussian; it is not an exact draw from p(x|y).

## Measured

{about_baseline(bundle, rows, baseline)}Robust accuracies are in pixels of [0,1]; the published EB-JDAT code works in [-1,1], so its 8/255 is 4/255 here.

{table(chief(bundle, rows), baseline)}

{landscape}
{worse(bundle, rows)}
<details><summary>All {len(rows)} figures</summary>

{table(rows, baseline)}

</details>

## What the flag sees

{flag_sentence(bundle, rows)}

## Data and licence

{licence(p.dataset)} {about_fid(rows)}
"""


def about_mean(bundle: Bundle) -> str:
    """Return a sentence on the two runs whose mean the weights are, if they are one."""
    other = bundle.manifest.provenance.configuration.get("averaged_with")
    name = other.get("name") if isinstance(other, dict) else None
    return f"The weights are the mean of two runs from one start, this one and `{name}`; steps are of both.\n" if name else ""


def about_baseline(bundle: Bundle, rows: list[Row], baseline: Baseline) -> str:
    """Return a sentence on the baseline and its column of the table."""
    warm = bundle.manifest.provenance.configuration.get("warm_start")
    if not warm:
        return ""
    init = bundle.manifest.provenance.init_sha256
    start = f"given weights (sha256 {init[:12]})" if init else f"`{warm}`"
    known = {key(row) for row in baseline.rows}
    if not any(key(row) in known for row in rows):
        other = f"is not compared: no figure of the {baseline.title} is of the same protocol and n"
        lack = other if baseline.rows else "was not evaluated"
        return f"It was continued from {start}, the warm start, which {lack}.\n"
    clean = next((row.of[:12] for row in rows_where(baseline.rows, "accuracy_clean")), "")
    others = ", ".join(sorted({row.of[:12] for row in baseline.rows} - {clean}))
    whose_sha = f" (weights sha256 {clean}{f'; a graph or a copy in fp16: {others}' if others else ''})" if clean else ""
    control = f"plain adversarial training continued from {start} instead"
    whose = f"{start}, which this model was continued from" if baseline.title == WARM_START else control
    return (
        f"The column `{baseline.title}` is of {whose}{whose_sha}, by the same protocol on the\n"
        f"same number of images; where it is empty, the {baseline.title} was not measured so.\n"
    )


def worse(bundle: Bundle, rows: list[Row]) -> str:
    """Return a sentence on the sets whose AUROC is worse than chance, by its interval."""
    names = dict.fromkeys(("energy", served_score(bundle), BASELINE))
    found = [row for name in names for row in rows_where(rows, f"auroc_{name}") if worse_than_chance(row)]
    poor = "; ".join(f"{row.score} on {set_name(row)} ({row.value:.3f})" for row in found)
    return f"\n**Worse than chance** (the 95 % interval of the AUROC lies below 0.5): {poor}.\n" if poor else ""


def about_fid(rows: list[Row]) -> str:
    """Return a sentence on whether a figure is FID."""
    if rows_where(rows, "fid"):
        return "`fid` is of Inception-v3 with its standard weights; other distances name their extractor."
    return "No figure here is FID: no Inception weights were available, and every distance names its extractor."


def method_kind(bundle: Bundle) -> str:
    """Return the class name of the method that trained the bundle."""
    method = bundle.manifest.provenance.configuration.get("method", "unknown")
    if isinstance(method, dict):
        return str(method.get("kind", "unknown"))
    return "EbJdat" if method == "ebjdat" else str(method)  # schema 1 has a name


def short(git: str) -> str:
    """Return an abbreviated commit that keeps the mark of a modified tree."""
    commit, dirty, _ = git.partition("-dirty")
    return commit[:12] + dirty


def readme_table(bundle: Bundle) -> str:
    """Return the README's table of nine figures, each with its comparison."""
    lines = ["| | this model | compared with | n | metric |", "|---|---|---|---|---|"]
    for text, row, others in readme_rows(bundle, bundle.metrics(), baseline_of(bundle)):
        comparison = "; ".join(f"{name} {figure(other)}" for name, other in others) or "not measured"
        lines.append(f"| {text} | {figure(row)} | {comparison} | {row.n:,} | `{row.metric}` |")
    return "\n".join(lines)


def readme_limits(bundle: Bundle) -> str:
    """Return the README's limits that are figures; each claim depends on them."""
    rows, m = bundle.metrics(), model_of(bundle)
    f, level = Flagged(bundle, rows), {"alpha": ALPHA}
    fooled = f.counted("flag_power", subset="fooled", **m.test, **m.pgd, **level)
    clean = f.counted("flag_rate_clean", **m.test, **level)
    return "\n".join(
        [
            *costs(bundle, rows),
            *odd_limit(f),
            *benign_limit(f, clean),
            f"- Attacks in the ball: of the images that PGD-20 at {eps_name(m.eps)} fooled it flags {fooled}; of clean ones {clean}.",
            *close_limit(f),
            *knowing_limit(f),
        ]
    )


def costs(bundle: Bundle, rows: list[Row]) -> list[str]:
    """Return the robustness lost against the baseline, if that was measured by the same protocol on as many images."""
    baseline = baseline_of(bundle)
    known = {key(row): row for row in baseline.rows}
    m = model_of(bundle)
    chosen = [first(rows, metric, norm="linf", eps=m.eps) for metric in ("accuracy_pgd20", "accuracy_apgd", "accuracy_autoattack")]
    pairs = [(row, known[key(row)]) for row in chosen if row and key(row) in known]
    if not pairs:
        return []
    costly = any(row.interval[1] < other.interval[0] for row, other in pairs if row.interval and other.interval)
    losses = "; ".join(f"{figure(row)} against {figure(other)} under {under(row)}, n = {row.n:,}" for row, other in pairs)
    method = {"EbJdat": "EB-JDAT"}.get(method_kind(bundle), method_kind(bundle))
    against = f"against its {baseline.title}"
    title = f"**{method} costs robustness** {against}" if costly else f"Robustness {against}"
    return [f"- {title}, at l-inf {eps_name(m.eps)}: {losses}."]


def under(row: Row) -> str:
    """Return the name of a row's attack, with its objective if the row has one."""
    return attack_name(row) + (f" on {OBJECTIVES[row.objective]}" if row.objective else "")


def baseline_of(bundle: Bundle) -> Baseline:
    """Return the figures of the network that the card compares with, or none; raise BundleError for a bundle with two."""
    found = [name for name in BASELINES if name in bundle.manifest.files and (bundle.path / name).is_file()]
    if len(found) > 1:
        raise BundleError(
            f"{bundle.path} has {' and '.join(found)}, and a card compares with one: measure with the baseline to keep, which removes the other"
        )
    return Baseline(BASELINES[found[0]], read_rows(bundle.path / found[0])) if found else UNCOMPARED


def write_sections(text: str, sections: dict[str, str]) -> str:
    """Return ``text`` with each section between its markers, <!-- name --> and <!-- /name -->; raise BundleError for missing markers."""
    for name, content in sections.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        found = re.fullmatch(f"(?s)(.*){start}.*{end}(.*)", text)
        if found is None or text.count(start) != 1 or text.count(end) != 1:
            raise BundleError(f"the README must contain {start} and {end} once each: add them where the figures belong")
        text = f"{found[1]}{start}\n\n{content}\n\n{end}{found[2]}"
    return text


def rewrite(bundle: Bundle) -> Bundle:
    """Write the card of a bundle again from its files; generate samples if it has none."""
    return renew_card(bundle, bundle.metrics(), baseline_of(bundle), {}, samples="samples.png" not in bundle.manifest.files)


def main() -> None:
    """Write the card of the bundle named on the command line, and the README's sections on request."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--readme", type=Path, help="also write the generated sections of this file")
    parser.add_argument("--force", action="store_true", help=FORCED)
    options = parser.parse_args()
    with command(parser):
        try:
            text = options.readme.read_text(encoding="utf-8") if options.readme else ""
        except UnicodeDecodeError as error:
            raise BundleError(f"{options.readme} is no UTF-8 text ({error.reason}): give the README") from error
        if options.readme:
            write_sections(text, dict.fromkeys(("limits", "figures"), ""))  # check the markers before anything is changed
        bundle = edit(options.bundle, rewrite, force=options.force, renews=("README.md",))
        print(f"into {bundle.path / 'README.md'}")
        if options.readme:
            sections = {"limits": readme_limits(bundle), "figures": readme_table(bundle)}
            options.readme.write_text(write_sections(text, sections), encoding="utf-8")


if __name__ == "__main__":
    main()
