"""The model bundle: a directory that training writes, export completes and the server reads. No pickle anywhere.

bundle.json          this manifest        weights.safetensors  parameters and batch-norm statistics
classify.onnx        with its weights in weights.safetensors, as score.onnx and step.onnx, which not every bundle has
prior.safetensors    where chains start   views.safetensors    what the views of the OOD score were fitted to
calibration.json     clean energies and OOD scores   selftest.safetensors a few images and the source's outputs on them
calibration.NAME.json   scores that a server recorded, optional
metrics.json, README.md, samples.png, landscape.png   the evaluation   bundle.json.sig   a signature of the manifest, optional
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ebjdat_serve import strict_json
from ebjdat_serve.atomic import replacing
from ebjdat_serve.bounds import label_fault
from ebjdat_serve.errors import BundleError, cause
from ebjdat_serve.graphs import check_graph
from ebjdat_serve.manifest import CALIBRATION_NAME, SCHEMA, YES, Calibration, FileEntry, Manifest, RecordedCalibration
from ebjdat_serve.parsing import parse
from ebjdat_serve.precision import OF_TRAINING, check
from ebjdat_serve.rows import Row, parse_rows, to_json
from ebjdat_serve.view_files import load_views
from ebjdat_serve.views import Combination

MANIFEST = "bundle.json"
SIGNATURE = "bundle.json.sig"
CANDIDATE = "candidate.json"  # in the folder of a bundle that a store holds back: {"reason", "comparison"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
LARGEST_MANIFEST, LARGEST_JSON, LARGEST_RECORDED = 4 * 2**20, 64 * 2**20, 4 * 2**20
MOST_RECORDED = 100
GRAPHS = ("classify.onnx", "score.onnx", "step.onnx")
SERVED = ("weights.safetensors", "classify.onnx", "selftest.safetensors")
"""The files that every finished bundle has; ``Bundle.required`` adds those of what it is capable of."""
CALIBRATED = ("calibration.json", "views.safetensors")
"""The files of a calibration: a bundle has both, or neither and no p-values."""
EVIDENCE = ("metrics.json", "README.md", "samples.png", "landscape.png", "baseline.json", "control.json")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    path: Path
    manifest: Manifest
    key: str = ""  # sha256 of bundle.json as read, and so of every file it lists

    @staticmethod
    def load(path: Path) -> "Bundle":
        """Return the bundle at ``path``, a bundle or a store, with every file's hash checked.

        Raises BundleError naming a file that is missing, damaged, of an unknown schema, or has unknown keys.
        """
        bundle = Bundle.draft(path)
        missing = [name for name in bundle.required if name not in bundle.manifest.files]
        if missing:
            raise BundleError(f"{bundle.path} is not finished: {', '.join(missing)} missing; export and calibrate it first")
        bundle.check_files()
        if bundle.calibrated:
            bundle.calibration()
        bundle.recorded()
        return bundle

    @staticmethod
    def draft(path: Path) -> "Bundle":
        """Return the bundle at ``path`` even if it is unfinished; only the manifest is checked."""
        path = resolve(path)
        content = read_bytes(path / MANIFEST, LARGEST_MANIFEST)
        data = parse_json(content, path / MANIFEST)
        if isinstance(data, dict) and (schema := data.get("schema")) != SCHEMA:
            fix = f"ebjdat-serve upgrade {path} NEW converts it" if schema == 1 else "serve it with the version that wrote it"
            raise BundleError(f"{path / MANIFEST}: schema {repr(schema)[:20]} is not {SCHEMA}, which this version reads; {fix}")
        manifest = parse(Manifest, data, str(path / MANIFEST))
        strange = [name for name in manifest.files if not NAME.fullmatch(name)]
        if strange:
            raise BundleError(f"{path / MANIFEST}: {strange[0][:40]!r} is not a plain file name")
        if taken := [name for name in manifest.files if name in (MANIFEST, SIGNATURE, CANDIDATE)]:
            raise BundleError(f"{path / MANIFEST}: files lists {taken[0]}, which others write beside it; leave it out")
        if not isinstance(manifest.architecture.get("family"), str):
            raise BundleError(f"{path / MANIFEST}: architecture must name the network's family")
        for what in (manifest.name, manifest.version):
            if not NAME.fullmatch(what):
                raise BundleError(
                    f"{path / MANIFEST}: {what[:40]!r} is not a valid name or version: letters, digits and, after the first, . _ + -, "
                    "100 in all"
                )
        if fault := label_fault(manifest.labels):
            raise BundleError(f"{path / MANIFEST}: labels: {fault}")
        if fault := capability_fault(manifest):
            raise BundleError(f"{path / MANIFEST}: capabilities: {fault}")
        return Bundle(path, manifest, hashlib.sha256(content).hexdigest())

    @property
    def functions(self) -> tuple[str, ...]:
        """Return the functions that the bundle is capable of: classify, and score and step if it has a gradient and generates."""
        can = self.manifest.capabilities
        return ("classify", *(["score"] if can.gradient == YES else []), *(["step"] if can.generate == YES else []))

    @property
    def required(self) -> tuple[str, ...]:
        """Return the files without which the bundle is unfinished, by what it is capable of."""
        prior = ["prior.safetensors"] if "step" in self.functions else []
        calibrated = CALIBRATED if self.calibrated else ()
        return (*SERVED, *calibrated, *(graph_name(function, "fp32") for function in self.functions if function != "classify"), *prior)

    @property
    def calibrated(self) -> bool:
        """Return whether the bundle has a calibration; without one it gives neither p-values nor a flag."""
        return any(name in self.manifest.files for name in CALIBRATED)

    @property
    def served(self) -> str:
        """Return the sha256 of the manifest without evaluation files, which do not affect responses."""
        files = {name: entry for name, entry in self.manifest.files.items() if name not in EVIDENCE}
        return hashlib.sha256(json.dumps(asdict(replace(self.manifest, files=files)), sort_keys=True).encode()).hexdigest()

    def check_files(self, *, without: Collection[str] = ()) -> None:
        """Raise BundleError naming the first file, those ``without`` apart, that does not match the manifest, or leaves the bundle."""
        home = self.path.resolve()
        for name, entry in self.manifest.files.items():
            file = self.path / name
            if file.resolve().parent != home:
                raise BundleError(f"{file} is a link that leaves the bundle; put the file itself there")
            if name in without:
                continue
            if not file.is_file():
                raise BundleError(f"{file} is missing: restore the bundle")
            try:
                whole = file.stat().st_size == entry.bytes and sha256(file) == entry.sha256
            except OSError as error:
                raise BundleError(f"{file} cannot be read: {cause(error)}") from error
            if not whole:
                raise BundleError(f"{file} is damaged: it does not match its sha256 in {MANIFEST}; restore the bundle")
            if name.endswith(".onnx"):
                check_graph(file, self.manifest.files)

    def graph(self, function: str, precision: str = "fp32") -> Path:
        """Return the path of the graph of ``function`` (classify, score, step) in ``precision``, or in fp32 where that precision has none.

        Raises BundleError when the bundle does not classify in ``precision`` at all.
        """
        own = graph_name(function, precision)
        if own in self.manifest.files:
            return self.path / own
        if function == "classify":
            raise BundleError(
                f"{self.path} has no {own}; {self._made(precision)} creates and measures it",
                options=("--precision fp32",),
            )
        return self.path / graph_name(function, "fp32")

    def _made(self, precision: str) -> str:
        """Return the command that adds a lower precision to the bundle."""
        if self.manifest.imported and precision == "int8":
            return "ebjdat-serve quantize BUNDLE DIR"
        return f"python training/precision.py BUNDLE --precision {precision}"

    def measured(self, precision: str) -> str:
        """Return the sha256 that figures of ``precision`` refer to: its graph's; for bf16, which has no graph, the weights'."""
        name = "weights.safetensors" if precision == "bf16" else self.graph("classify", precision).name
        return self.manifest.files[name].sha256

    def check_precision(self, precision: str) -> None:
        """Raise BundleError when a figure of ``precision`` is missing or beyond its limit; fp32 needs none."""
        if precision != "fp32":
            of, m = {self.measured(precision)}, self.manifest
            if "step" in self.functions:
                of.add(m.files["weights.safetensors" if precision == "bf16" else self.graph("step", precision).name].sha256)
            without = [
                *(OF_TRAINING if m.imported else ()),
                *(["step_error_max"] if m.imported or "step" not in self.functions else []),
                *(["energy_error_mean_over_sd"] if m.capabilities.energy != YES else []),
                *([] if self.calibrated else ["flag_rate_excess"]),
            ]
            check(self.metrics(), precision, of, without=without)

    def holds(self, of: str) -> bool:
        """Return whether ``of`` is the sha256 of one of the bundle's files; figures of any other file are stale."""
        return any(entry.sha256 == of for entry in self.manifest.files.values())

    def calibrations(self) -> list[Calibration]:
        """Return the calibrations of all precisions, stale or not, in file order."""
        file = self.path / "calibration.json"
        found = read_json(file) if file.is_file() else []
        if not isinstance(found, list):
            raise BundleError(f"{file} must be a list of calibrations")
        return [parse(Calibration, calibration, str(file)) for calibration in found]

    def calibration(self, precision: str = "fp32") -> Calibration:
        """Return the calibration of ``precision``; raise BundleError when it is missing or measured on another graph."""
        found = next((row for row in self.calibrations() if row.precision == precision), None)
        if found is None:
            fp32 = "ebjdat-serve calibrate BUNDLE DIR, or python training/calibrate.py BUNDLE"
            how = fp32 if precision == "fp32" else self._made(precision)
            raise BundleError(f"{self.path / 'calibration.json'} holds no {precision} calibration; run {how}")
        if found.of != self.measured(precision):
            raise BundleError(
                f"{self.path / 'calibration.json'} is stale: {precision} was measured on {found.of[:12]}, the served graph is "
                f"{self.measured(precision)[:12]}; calibrate again"
            )
        energies = len(found.scores) if self.manifest.capabilities.energy == YES else 0
        for values, n in ((found.energies, energies), (found.scores, len(found.scores))):
            if values != sorted(values) or len(values) != n:
                raise BundleError(f"{self.path / 'calibration.json'}: energies and scores must be sorted and of equal number")
        if found.reviewed not in (["ood"], ["ood", "margin"]):
            raise BundleError(f"{self.path / 'calibration.json'}: reviewed must be ood, or ood and margin")
        return found

    def recorded(self) -> dict[str, RecordedCalibration]:
        """Return the calibrations by recorded scores, stale or not, by name; raise BundleError for one that is damaged."""
        named = {file.removeprefix("calibration.").removesuffix(".json"): file for file in self.manifest.files}
        files = {name: self.path / file for name, file in named.items() if file == recorded_file(name) and CALIBRATION_NAME.fullmatch(name)}
        check_number(files)
        found = {}
        for name, file in files.items():
            found[name] = parse(RecordedCalibration, parse_json(read_bytes(file, LARGEST_RECORDED), file), str(file))
            if found[name].name != name:
                raise BundleError(f"{file} is the calibration {found[name].name}")
        return found

    def combination(self, precision: str = "fp32") -> Combination:
        """Return the views of the OOD score in ``precision``, as fitted; raise BundleError for one that is unknown or was not stored."""
        return load_views(self.path / "views.safetensors", precision, self.calibration(precision).views)

    def metrics(self) -> list[Row]:
        """Return the rows of metrics.json, or an empty list when the bundle was not evaluated; raise BundleError for an invalid row."""
        file = self.path / "metrics.json"
        return read_rows(file) if file.is_file() else []

    def update(self, *names: str, **changes: Any) -> "Bundle":
        """Record the newly written files ``names`` and manifest ``changes``; replace the manifest atomically."""
        files = dict(self.manifest.files)
        for name in names:
            files[name] = FileEntry(sha256(self.path / name), (self.path / name).stat().st_size)
        manifest = replace(self.manifest, files=dict(sorted(files.items())), **changes)
        write_json(self.path / MANIFEST, asdict(manifest))
        return Bundle(self.path, manifest, sha256(self.path / MANIFEST))

    def without(self, *names: str) -> "Bundle":
        """Delete the files ``names``, those that are there, which the manifest no longer lists."""
        files = {name: entry for name, entry in self.manifest.files.items() if name not in names}
        done = replace(self, manifest=replace(self.manifest, files=files)).update()
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        return done


def draws(bundle: Bundle) -> bool:
    """Return whether a bundle gives workers for /generate, /explain and check=reach anything to do: steps, or gradients."""
    return len(bundle.functions) > 1


def capability_fault(manifest: Manifest) -> str:
    """Return which capabilities contradict each other or the output, "" if none do."""
    can = manifest.capabilities
    if empty := [name for name, reason in vars(can).items() if not reason.strip()]:
        return f"{empty[0]} must be {YES!r} or the reason why not"
    if manifest.output == "probabilities" and can.energy == YES:
        return "energy: a model that gives probabilities has none, since their logs are normalised"
    if can.energy != YES and can.generate == YES:
        return "generate: it follows the energy, which this model does not have"
    if manifest.prior and len(manifest.prior.images) != len(manifest.labels):
        return f"generate: prior tells the images of {len(manifest.prior.images)} classes, of which there are {len(manifest.labels)}"
    if can.generate == YES and not manifest.drawn:
        return "generate: no class has a prior"
    return ""


def network_name(architecture: Mapping[str, Any]) -> str:
    """Return family and sizes as a short name: preactresnet 18, timm resnet50."""
    told = [value for name, value in architecture.items() if name not in ("family", "head") and isinstance(value, int | float | str)]
    config = architecture.get("config")  # of a Hugging Face model
    told += [config["model_type"]] if isinstance(config, Mapping) and "model_type" in config else []
    sizes = "-".join(map(str, told))
    return f"{architecture['family']} {sizes}".strip()


def check_number(names: Collection[str]) -> None:
    """Raise BundleError where there are more calibrations of recorded scores than a bundle may hold: all are read when it is opened."""
    if len(names) > MOST_RECORDED:
        raise BundleError(f"a bundle holds {MOST_RECORDED} calibrations of recorded scores at most, not {len(names)}")


def recorded_file(name: str) -> str:
    """Return the file name of the calibration ``name`` by recorded scores."""
    return f"calibration.{name}.json"


def graph_name(function: str, precision: str) -> str:
    """Return the file name of the graph of ``function`` in ``precision``."""
    return f"{function}.onnx" if precision == "fp32" else f"{function}.{precision}.onnx"


def resolve(path: Path) -> Path:
    """Return the bundle folder at ``path``: itself, or the target of a store's ``current``."""
    if (path / MANIFEST).is_file():
        return path.resolve()  # so that later changes of store/current have no effect
    if (path / "current" / MANIFEST).is_file():
        return (path / "current").resolve()
    raise BundleError(f"{path} is neither a bundle (no {MANIFEST}) nor a store (no current/{MANIFEST})")


def sha256(file: Path) -> str:
    """Return the hex sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path) -> Any:
    """Return the parsed file; raise BundleError when it is missing or not JSON."""
    return parse_json(read_bytes(file), file)


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a metrics.json; raise BundleError naming the file, row and key of an invalid one."""
    return parse_rows(read_json(file), file)


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write rows as a metrics.json."""
    write_json(file, [to_json(row) for row in rows])


def read_bytes(file: Path, most: int = LARGEST_JSON) -> bytes:
    """Return the file's content; raise BundleError when it cannot be read or exceeds ``most`` bytes."""
    try:
        if file.stat().st_size > most:
            raise BundleError(f"{file} is larger than {most} bytes")
        return file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {cause(error)}") from error


def parse_json(content: bytes, file: Path) -> Any:
    """Return the JSON document in ``content``; raise BundleError naming ``file`` when it is not JSON, which has no NaN and no Infinity."""
    try:
        return strict_json.loads(content, unique=True)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read: {error}") from error


def write_json(file: Path, data: Mapping[str, Any] | list[Any]) -> None:
    """Write ``data`` as indented JSON, atomically."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
