"""Convert a bundle of schema 1 to schema 2, in a new folder: `ebjdat-serve upgrade OLD NEW`.

Its classify graphs gain the output ``features``, which is what their head takes; that nothing else of them changes is checked. Its OOD
score becomes a sum of one view, with the p-values that it had: training/calibrate.py fits the others where the training images are.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load_file, save_file

from ebjdat_serve.bundle import MANIFEST, SIGNATURE, Bundle, graph_name, read_json, resolve, sha256, write_json, write_rows
from ebjdat_serve.card import retitled
from ebjdat_serve.errors import BundleError
from ebjdat_serve.graphs import with_features
from ebjdat_serve.manifest import SCHEMA, Calibration, Capabilities, Input, Licence
from ebjdat_serve.scores import DEFAULT
from ebjdat_serve.store import next_revision, store_of
from ebjdat_serve.view_files import save_views
from ebjdat_serve.views import DEFAULT_VIEWS, VIEWS, Combination

LATER = "the bundle was converted from schema 1, which had none: python training/calibrate.py BUNDLE"
FEATURES = "features"
OLD_CALIBRATION = ("of", "precision", "dataset", "temperature", "energies", "score", "weight", "scores")
SINCE = {"output": "logits", "capabilities": asdict(Capabilities()), "licence": asdict(Licence())}
INPUT = {one.name: one.default for one in fields(Input) if one.default is not MISSING}
"""What schema 2 says in addition: for a bundle of schema 1 these are the values."""


def upgrade(old: Path, new: Path) -> Bundle:
    """Write the bundle at ``old``, a bundle or a store, into the new folder ``new`` as schema 2; return it, verified.

    Raises BundleError for a bundle of another schema, for one that is damaged or unfinished, and when ``new`` is there already.
    """
    home = resolve(old)
    manifest = read_json(home / MANIFEST)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != 1:
        why = "which needs no upgrade" if schema == SCHEMA else "and only 1 is converted"
        raise BundleError(f"{home} is of schema {repr(schema)[:20]}, {why}")
    new = Path(os.path.abspath(new))
    if os.path.lexists(new):
        raise BundleError(f"{new} exists already: name a folder that does not")
    if new.is_relative_to(home):
        raise BundleError(f"{new} is inside the bundle that is to be converted: name a folder elsewhere")
    new.parent.mkdir(parents=True, exist_ok=True)
    temporary = new.with_name(f".upgrading-{new.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(home, temporary, ignore=shutil.ignore_patterns(SIGNATURE), copy_function=shutil.copyfile)
        bundle = converted(temporary, manifest)
        bundle = retitled(bundle, next_revision(bundle, store_of(home)))
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner may read
        Bundle.load(temporary)
        temporary.rename(new)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Bundle.load(new)


def converted(folder: Path, manifest: dict[str, Any]) -> Bundle:
    """Convert the copy of a bundle in ``folder``, whose files are checked against its own manifest first."""
    size = manifest.get("input")
    write_json(folder / MANIFEST, {**SINCE, **manifest, "input": {**INPUT, **(size if isinstance(size, dict) else {})}, "schema": SCHEMA})
    bundle = Bundle.draft(folder)
    bundle.check_files()
    changed = [name for name in bundle.manifest.files if name.startswith("classify.") and name.endswith(".onnx")]
    before = {name: sha256(folder / name) for name in changed}
    outputs = {name: probed(bundle, name) for name in changed}
    for name in changed:
        (folder / name).write_bytes(with_features((folder / name).read_bytes(), str(folder / name)))
    bundle = bundle.update(*changed)
    for name, found in outputs.items():
        again = probed(bundle, name)
        if any(not np.array_equal(again[output], values) for output, values in found.items()):
            raise BundleError(f"{folder / name}: with one more output it computes something else")
    now = {old: sha256(folder / name) for name, old in before.items()}
    selftest = load_file(folder / "selftest.safetensors")
    features = probed(bundle, graph_name("classify", "fp32"))[FEATURES]
    save_file({**selftest, FEATURES: features}, folder / "selftest.safetensors")
    names = ["selftest.safetensors", *recalibrated(folder, now)]
    if "metrics.json" in bundle.manifest.files:
        write_rows(folder / "metrics.json", [replace(row, of=now.get(row.of, row.of)) for row in bundle.metrics()])
        names.append("metrics.json")
    return bundle.update(*names)


def probed(bundle: Bundle, name: str) -> Mapping[str, Any]:
    """Return the outputs of a graph on the self-test's images, by name."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(bundle.path / name), options, providers=["CPUExecutionProvider"])
    image = load_file(bundle.path / "selftest.safetensors")["image"]
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image}), strict=True))


def recalibrated(folder: Path, now: Mapping[str, str]) -> list[str]:
    """Write calibration.json and views.safetensors of the scores that the bundle has, and return their names.

    The view's ranks are those of the calibration's own scores: a rank is monotone in the score, so the p-values stay what they were.
    """
    file, calibrations, fitted, reviewed = folder / "calibration.json", [], {}, {}
    rows = read_json(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == set(OLD_CALIBRATION) for row in rows):
        raise BundleError(f"{file} is no calibration of schema 1, which has {', '.join(OLD_CALIBRATION)}")
    for row in rows:
        name = "logits" if row["score"] == DEFAULT else row["score"]
        if name not in VIEWS:
            raise BundleError(f"{file}: the score {name!r} is no view of this version, which knows {', '.join(VIEWS)}")
        clean = np.asarray(row["scores"], np.float32)
        combination = Combination({name: {"weight": np.float64(row["weight"])}}, {name: clean}, {name: VIEWS[name]})  # type: ignore[dict-item]
        scores = combination.score(combination.ranked(clean[:, None]))
        fitted[row["precision"]], reviewed[row["precision"]] = combination, {"ood": scores}
        calibrations.append(
            Calibration(
                of=now.get(row["of"], row["of"]),
                precision=row["precision"],
                dataset=row["dataset"],
                handled=0.0,
                temperature=row["temperature"],
                energies=row["energies"],
                views=[name],
                left_out={view: LATER for view in DEFAULT_VIEWS if view != name},
                reviewed=["ood"],
                reach_steps=0,
                scores=[float(score) for score in scores],
            )
        )
    save_views(folder / "views.safetensors", fitted, reviewed)
    write_json(file, [asdict(calibration) for calibration in calibrations])
    return [file.name, "views.safetensors"]
