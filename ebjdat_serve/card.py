"""Text renderings of a bundle's JSON: the summary that `inspect` prints, and the title and tables of the model card."""

from ebjdat_serve.bundle import Bundle, network_name
from ebjdat_serve.manifest import YES, Calibration, Manifest
from ebjdat_serve.rows import Row
from ebjdat_serve.scores import SCORES, uncalibrated
from ebjdat_serve.sentences import data_words, protocol_words
from ebjdat_serve.store import reason_held_back


def summary(bundle: Bundle) -> str:
    """Return the summary that `ebjdat-serve inspect` prints."""
    m, p, s = bundle.manifest, bundle.manifest.provenance, bundle.manifest.sampler
    lines = [
        f"{m.name}@{m.version}",
        f"  path          {bundle.path}",
        f"  architecture  {network_name(m.architecture)}, input {m.input.described()}",
        f"  labels        {', '.join(m.labels)}",
        f"  sampler       {s.steps} steps of {s.step_size}, gradient clip {s.grad_clip}, noise {s.noise_std}",
        f"  trained       preset {p.preset}, seed {p.seed}, {p.dataset}, git {p.git[:12]}, {p.started}",
        f"  steps         {p.steps} of {p.planned_steps} planned, rolled back {p.rollbacks} times",
    ]
    reasons = [f"no {name}: {why}" for name, why in vars(m.capabilities).items() if why != YES]
    lines += [f"  capable       {'; '.join(reasons) or 'of energy, gradient and generation'}"]
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
    lines.append("  files")
    lines += [f"    {name:24}{entry.bytes:>10} bytes  sha256 {entry.sha256[:16]}" for name, entry in m.files.items()]
    rows = bundle.metrics()
    if rows:
        lines.append("  metrics")
        lines += [f"    {row.metric:32}{figure(row):>24}  n = {row.n:<6} {data_words(row)}: {protocol_words(row)}" for row in rows]
    return "\n".join(lines)


def score_words(manifest: Manifest, calibration: Calibration | None) -> str:
    """Return what the OOD score is, and what can be decided by it."""
    if calibration:
        return f"the sum of the views {', '.join(calibration.views)}, calibrated on {len(calibration.scores)} images"
    equation = SCORES[uncalibrated(energy=manifest.capabilities.energy == YES)].equation
    return f"{equation}: not calibrated, so it ranks images and has no p-value and no threshold"


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


def figure(row: Row) -> str:
    """Return a value with its interval or standard error, as text."""
    text = f"{row.value:.4g}"
    if row.interval is not None:
        low, high = (0.0 if abs(bound) < 1e-9 else bound for bound in row.interval)
        text += f" [{low:.3g}, {high:.3g}]"
    elif row.stderr is not None:
        text += f" ± {row.stderr:.2g}"
    return text


def table(rows: list[Row], baseline: list[Row]) -> str:
    """Return a Markdown table of ``rows``, with a column for the warm start's measurements if there are any."""
    known = {key(row): row for row in baseline}
    paired = any(key(row) in known for row in rows)
    names = ["figure", "this model", *(["warm start"] if paired else []), "n", "data", "protocol"]
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
