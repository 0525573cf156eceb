"""Command-line overrides of presets (--set), and the preset list of --help."""

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ebjdat_serve import strict_json
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.rows import first
from ebjdat_serve.server.settings import SHIPPED
from training.config import SHARED, Preset
from training.errors import TrainingError
from training.presets import METHODS, PRESETS

OTHERS = ("warm_start.", "averaged_with.")
"""Prefixes of the fields of other stages."""
STAGE_NAME = re.compile(r"(?!store$)[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
MEASURED = Path(__file__).parent.parent / "benchmarks" / "methods.json"


def override(preset: Preset, settings: list[str]) -> Preset:
    """Return ``preset`` with FIELD=VALUE settings applied; raise TrainingError naming the known fields.

    A nested field is named by its path, ``method.chains.steps``, or by its last name if it is unique, ``beta``; fields of the warm
    start begin with ``warm_start.``, of the stage that it is averaged with by ``averaged_with.``.
    """
    for setting in settings:
        name, _, value = setting.partition("=")
        known = paths(preset)
        path = name if name in known else unique(name, [path for path in known if not path.startswith(OTHERS)], setting)
        own = path
        while own.startswith(OTHERS):
            own = own.partition(".")[2]
        if own != path and own.partition(".")[0] in SHARED:
            raise TrainingError(f"--set {setting}: all stages have one {own.partition('.')[0]}, the last one's: set {own}={value}")
        preset = changed(preset, path.split("."), value, setting)
    return preset


def paths(part: Any, before: str = "") -> list[str]:
    """Return the dotted names of the plain fields of a dataclass and its parts."""
    found: list[str] = []
    for field in fields(part):
        value = getattr(part, field.name)
        if is_dataclass(value):
            found += paths(value, f"{before}{field.name}.")
        elif isinstance(value, int | float | str):
            found.append(f"{before}{field.name}")
    return found


def unique(name: str, known: list[str], setting: str) -> str:
    """Return the unique path that ends in ``name``; raise TrainingError for none or several."""
    matches = [path for path in known if path.endswith(f".{name}")]
    if len(matches) == 1:
        return matches[0]
    message = (
        f"{name} is one of {', '.join(matches)}"
        if matches
        else f"fields are {', '.join(known)}; prefix one with {' or '.join(OTHERS)} for another stage"
    )
    raise TrainingError(f"--set {setting}: {message}")


def changed(part: Any, path: list[str], value: str, setting: str) -> Any:
    """Return the dataclass with the field at ``path`` parsed from ``value`` by its type."""
    name, *rest = path
    old = getattr(part, name)
    if rest:
        return checked(part, name, changed(old, rest, value, setting), setting)
    kind: Any = {field.name: field.type for field in fields(part)}[name]  # not type(old): epochs=12 is a float
    try:
        new = {"true": True, "false": False}[value] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise TrainingError(f"--set {setting}: {name} is a {kind.__name__}") from None
    if name == "name" and not STAGE_NAME.fullmatch(str(new)):
        raise TrainingError(f"--set {setting}: a stage is named by letters, digits, - _ and ., and not store: its folder is named so")
    return checked(part, name, new, setting)


def checked(part: Any, name: str, value: Any, setting: str) -> Any:
    """Return the dataclass with one field replaced; raise TrainingError when its validation fails."""
    try:
        return replace(part, **{name: value})
    except ValueError as error:
        raise TrainingError(f"--set {setting}: {error}") from error


def bundled_model() -> tuple[dict[str, Any], str]:
    """Return the bundled model's architecture and its accuracies as text; nothing where it is damaged: other presets are there yet."""
    try:
        shipped = Bundle.draft(SHIPPED)
        rows = shipped.metrics()
    except EbjdatError:
        return {}, ""
    clean, pgd20 = first(rows, "accuracy_clean"), first(rows, "accuracy_pgd20", norm="linf", eps=8 / 255)
    if clean is None or pgd20 is None:
        return {}, ""
    return shipped.manifest.architecture, f"clean {clean.value:.3f}, PGD-20 8/255 {pgd20.value:.3f} (the bundled model); "


def listing() -> str:
    """Return presets and methods with their accuracies and training times, for --help."""
    lines = ["presets, from data to a published bundle:"]
    drawn, reached = bundled_model()
    summaries = {
        "cifar10-small": "about 15 hours on one core, estimated; its runs are in docs/equal_budget.md",
        "cifar10-wrn16": "75 minutes on one core",
        "cifar10": "cifar10-small on WRN-16-4, for a GPU; not measured yet",
        "cifar10-full": "cifar10-small on WRN-28-10, for a GPU; not measured yet, an estimate is in docs/training.md",
        "digits": "about a minute on one core",
    }
    for name, stage in PRESETS.items():
        bundled = reached if stage.architecture.described() == drawn else ""
        lines.append(f"  {name:22}{bundled}{summaries.get(name, 'not measured')}")
    lines.append("methods, on --budget digits (8 x 8; mean of 3 seeds, PGD-20 at l-inf 51/255), small (CIFAR-10, a core) or large (a GPU):")
    measured = summaries_of(MEASURED)
    lines += [f"  {name:22}{measured.get(name, 'not measured')}" for name in METHODS]
    return "\n".join(lines)


def summaries_of(file: Path) -> dict[str, str]:
    """Return what benchmarks/methods.py found of each method; nothing of a missing or damaged file, as help needs none."""
    try:
        measured = strict_json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = measured.items() if isinstance(measured, dict) else ()
    return {name: entry["summary"] for name, entry in entries if isinstance(entry, dict) and isinstance(entry.get("summary"), str)}
