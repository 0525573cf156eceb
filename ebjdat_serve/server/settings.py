"""Server settings: one declaration from which flags, environment variables, checks, help and the table in docs/serving.md come.

A flag wins over its variable, a variable over the default; a variable that is set to nothing counts as not set.
"""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ebjdat_serve.cpus import cpus
from ebjdat_serve.engines import Device, EngineKind, Precision
from ebjdat_serve.logs import Style
from ebjdat_serve.manifest import OF_IMAGES
from ebjdat_serve.server.declaration import About, count, declared, seconds
from ebjdat_serve.verification import Terms

SHIPPED = Path(__file__).parent.parent / "models" / "cifar10"
Check = Literal["none", "reach"]
Profile = Literal["full", "public"]
"""What answers tell: everything, or what answer/public.py leaves."""
OPERATE = "operate"
"""The scope of a key whose answers are full under any profile."""
MODEL, ADDRESS, CLIENTS, WORKERS, PUBLISHING, REQUEST, LOAD, CONNECTION, OUTPUT = (
    "model", "address", "keys and clients", "workers", "answers and browsers", "limits of one request", "limits under load",
    "connections and shutdown", "output",
)  # fmt: skip
Header = Literal["x-forwarded-for", "forwarded"]
ARRIVE_SECONDS = 2.0
"""Time of a stop in which last answers are read by their clients."""


def per_client(help: str, unit: str, most: int) -> About:
    """Return what a limit of each client is; ``most`` where others than this machine's programs are clients."""
    shown = f"{most} beyond loopback or behind trusted proxies, else 0"
    return About(CLIENTS, f"{help}, of one client, beyond which it is answered 429; 0: no limit", unit, at_least=0, shown=shown)


DECODERS = min(cpus() + 1, 4)
"""Each decodes on one CPU, and one is left for images that are not heavy."""


@dataclass(frozen=True)
class Settings:
    """What an operator may set."""

    model: Annotated[Path, About(MODEL, "bundle or store to serve", shown="the shipped CIFAR-10 model")] = SHIPPED
    more: Annotated[
        tuple[Path, ...], About(MODEL, "further bundles or stores, at /models/NAME; each may be given as NAME=PATH", metavar="[NAME=]MODEL")
    ] = ()
    engine: Annotated[EngineKind, About(MODEL, "engine that runs the model")] = "auto"
    device: Annotated[Device, About(MODEL, "device; auto: CUDA if there is one, never TensorRT")] = "auto"
    precision: Annotated[Precision, About(MODEL, "arithmetic of the model; bf16 needs the torch engine")] = "fp32"
    calibration: Annotated[
        str, About(MODEL, "calibration that p-values are by: on images, or of recorded scores (docs/drift.md)", metavar="NAME")
    ] = OF_IMAGES
    alpha: Annotated[float, About(MODEL, "p-value below which an image is suspicious", above=0, below=1)] = 0.05
    check: Annotated[Check, About(MODEL, "what every /classify is checked for; a request chooses with ?check=")] = "none"
    check_radius: Annotated[float, About(MODEL, "l-inf radius of a check's search, of [0,1]", above=0, below=1, shown="2/255")] = 2 / 255
    review_share: Annotated[float | None, About(MODEL, "share of clean images sent to review", above=0, below=1, shown="0.05")] = None
    trust: Annotated[
        tuple[Path, ...],
        About(MODEL, "public key: serve only bundles that one of these keys signed; may be repeated", metavar="KEY.pub.pem"),
    ] = ()

    host: Annotated[Literal["127.0.0.1", "localhost", "0.0.0.0", "::"], About(ADDRESS, "address to listen on")] = "127.0.0.1"
    port: Annotated[int, About(ADDRESS, "port to listen on", at_least=1024, at_most=65535)] = 8000

    keys: Annotated[Path | None, About(CLIENTS, "key file (docs/keys.md): every request but /health needs a key", metavar="FILE")] = None
    trusted_proxy: Annotated[
        tuple[str, ...],
        About(CLIENTS, "proxy, or network of proxies, whose report of the client's address counts; may be repeated", metavar="NETWORK"),
    ] = ()
    forwarded_header: Annotated[Header, About(CLIENTS, "header in which trusted proxies report it")] = "x-forwarded-for"
    client_rate: Annotated[float | None, per_client("requests per second, twice as many at once", "requests per second", 50)] = None
    client_requests: Annotated[int | None, per_client("requests in progress", "requests", 32)] = None
    client_bodies: Annotated[int | None, per_client("bodies that have not arrived in full", "bodies", 16)] = None
    client_chains: Annotated[int | None, per_client("chains in progress", "chains", 64)] = None

    threads: Annotated[
        int | None,
        About(
            WORKERS, "threads of each worker; models share them", "threads", at_least=1, shown="half of the CPUs; above 64 x 64 pixels all"
        ),
    ] = None
    classify_workers: Annotated[int, count(WORKERS, "workers for /classify and /energy", "processes")] = 1
    generate_workers: Annotated[int, count(WORKERS, "workers for /generate and /explain; 0: neither, and less memory", "processes", 0)] = 1
    max_batch: Annotated[int, count(WORKERS, "images in one forward pass, unless a single list has more", "images")] = 32
    worker_timeout: Annotated[float, seconds(WORKERS, "silence after which a worker with requests is killed and replaced")] = 30.0
    open_timeout: Annotated[float, seconds(WORKERS, "time to open a new version; TensorRT builds engines for minutes")] = 1200.0
    refresh_interval: Annotated[float, seconds(WORKERS, "time between looks at the store")] = 1.0

    profile: Annotated[Profile, About(PUBLISHING, "public: no energies, p-values or load without a key of scope operate")] = "full"
    allow_generate: Annotated[bool, About(PUBLISHING, "with --profile public, /generate also of a model of private data")] = False
    root_path: Annotated[str, About(PUBLISHING, "path prefix under which a proxy serves this server, such as /ebjdat", metavar="PATH")] = ""
    cors_origin: Annotated[
        tuple[str, ...],
        About(PUBLISHING, "origin whose pages may call this server, such as https://example.org, or *; may be repeated", metavar="ORIGIN"),
    ] = ()
    allowed_host: Annotated[
        tuple[str, ...],
        About(PUBLISHING, "host name that requests may be for, such as api.example.org; may be repeated", shown="any", metavar="HOST"),
    ] = ()

    max_body: Annotated[int, count(REQUEST, "request body; the default holds the largest image as base64", "bytes")] = 22 * 2**20
    max_image_bytes: Annotated[int, count(REQUEST, "one encoded image; --max-body holds it, and a third more as base64", "bytes")] = (
        16 * 2**20
    )
    max_images: Annotated[int, count(REQUEST, "images in one JSON list", "images")] = 64
    max_pixels: Annotated[int, count(REQUEST, "one image, and a list in all; a JPEG decoded by --jpeg-draft: twice", "pixels")] = 25_000_000
    decode_seconds: Annotated[float, seconds(REQUEST, "processor time that decoding one image may take")] = 5.0
    jpeg_draft: Annotated[bool, About(REQUEST, "decode JPEGs above 2 megapixels at 1/2 to 1/8 of their size (docs/decisions/0022)")] = True
    max_samples: Annotated[int, count(REQUEST, "n of one /generate", "images")] = 64
    max_steps: Annotated[
        int,
        count(REQUEST, "steps of a chain; 0: the number that the bundle's sampler was tuned for", "steps", 0),
    ] = 0
    max_work: Annotated[int, count(REQUEST, "n x steps of one /generate", "chain-steps")] = 8000
    max_streamed: Annotated[int, count(REQUEST, "n of one stream", "images")] = 16
    max_previews: Annotated[int, count(REQUEST, "previews in one stream", "previews")] = 20
    max_scale: Annotated[int, count(REQUEST, "scale of a PNG, in its pixels per image pixel", "pixels")] = 16
    max_sheet: Annotated[int, count(REQUEST, "size of one PNG", "pixels")] = 2**24

    classify_queue: Annotated[
        int,
        count(LOAD, "requests in progress of one client, twice as many of all, beyond which /classify and /energy answer 503", "requests"),
    ] = 256
    generate_queue: Annotated[
        int, count(LOAD, "requests in progress of one client, twice as many of all, beyond which /generate answers 503", "requests")
    ] = 256
    generate_chains: Annotated[
        int, count(LOAD, "chains in progress of one client, twice as many of all, beyond which /generate answers 429", "chains")
    ] = 128
    generate_backlog: Annotated[float, seconds(LOAD, "estimated time of the work in progress beyond which /generate answers 429")] = 60.0
    classify_deadline: Annotated[float, seconds(LOAD, "time until a classify or energy request is answered 504")] = 10.0
    generate_deadline: Annotated[float, seconds(LOAD, "time until a generate request is answered 504")] = 120.0
    upload_memory: Annotated[int, count(LOAD, "all bodies and images, encoded and decoded, beyond which 503", "bytes")] = 256 * 2**20

    decoders: Annotated[
        int, About(LOAD, "processes that decode large images", "processes", at_least=1, shown="one more than the CPUs, at most 4")
    ] = DECODERS
    decode_memory: Annotated[
        int | None,
        About(
            LOAD,
            "memory of decoders of large images; all but 64 MiB for each is shared",
            "bytes",
            at_least=1,
            shown="384 MiB, and 64 MiB for each decoder",
        ),
    ] = None

    max_connections: Annotated[
        int, count(CONNECTION, "open connections, fewer where the limit of descriptors asks for it; idle ones make room", "connections")
    ] = 4096
    max_connections_per_address: Annotated[
        int, count(CONNECTION, "open connections of one address other than loopback and trusted proxies; 0: no limit", "connections", 0)
    ] = 256
    max_headers: Annotated[int, count(CONNECTION, "request target and headers, and 160 more for each header", "bytes")] = 64 * 2**10
    header_timeout: Annotated[float, seconds(CONNECTION, "time for the headers of a request to arrive")] = 20.0
    body_timeout: Annotated[float, seconds(CONNECTION, "time for a body to arrive")] = 30.0
    upload_grace: Annotated[float, seconds(CONNECTION, "time after which a body must have come at --min-upload-rate")] = 10.0
    min_upload_rate: Annotated[int, count(CONNECTION, "slowest upload, after --upload-grace", "bytes per second")] = 16 * 2**10
    read_timeout: Annotated[float, seconds(CONNECTION, "time in which a client must read some more of its response")] = 60.0
    keep_alive: Annotated[float, seconds(CONNECTION, "time that an idle connection is kept open; longer than proxies keep theirs")] = 75.0
    stream_heartbeat: Annotated[float, seconds(CONNECTION, "silence after which a stream sends a comment")] = 15.0
    drain_delay: Annotated[
        float, About(CONNECTION, "time that /health answers 503 after SIGTERM while requests are still accepted", "seconds", at_least=0)
    ] = 0.0
    graceful_timeout: Annotated[float, seconds(CONNECTION, "time that requests, except /generate, get to end after a stop signal")] = 6.0
    generate_graceful_timeout: Annotated[float, seconds(CONNECTION, "time that /generate requests get to end after a stop signal")] = 50.0

    log: Annotated[Style, About(OUTPUT, "text: for people; json: one object a line on standard output")] = "text"
    access_log: Annotated[bool | None, About(OUTPUT, "write a line for each request", shown="with --log json")] = None
    audit_log: Annotated[
        Path | None,
        About(OUTPUT, "file for a line of each image: sha256, version, scores and decision, never the image", metavar="FILE"),
    ] = None
    audit_log_bytes: Annotated[int, count(OUTPUT, "size at which the audit log is replaced", "bytes", 2**16)] = 64 * 2**20
    audit_log_files: Annotated[int, count(OUTPUT, "earlier files of the audit log that are kept", "files")] = 8
    drift_state: Annotated[
        Path | None, About(OUTPUT, "file by which the drift test (docs/drift.md) goes on after a restart", metavar="FILE")
    ] = None
    stock: Annotated[bool, About(OUTPUT, "serve by LitServe's own routes, queues and loops instead (docs/decisions/0004)")] = False

    def __post_init__(self) -> None:
        for one in SETTINGS:
            one.check(getattr(self, one.name), one.flag)

    @property
    def exposed(self) -> bool:
        """Whether others than this machine's programs can be clients: beyond loopback, and through a proxy."""
        return self.host not in ("127.0.0.1", "localhost") or bool(self.trusted_proxy)

    @property
    def last_answers(self) -> float:
        """Seconds after a stop signal by which whoever waits is answered, so that the answers arrive within ``graceful_timeout``."""
        return max(self.graceful_timeout / 2, self.graceful_timeout - ARRIVE_SECONDS)

    def terms(self, trust: tuple[bytes, ...] = ()) -> Terms:
        """Return how a bundle is to be served, with the public keys that ``trusted`` reads."""
        return Terms(
            self.engine,
            self.device,
            self.precision,
            self.alpha,
            self.threads,
            trust,
            self.review_share,
            self.calibration,
            1 + len(self.more),
        )

    def trusted(self) -> tuple[bytes, ...]:
        """Return the public keys of --trust; raise EbjdatError for a file that holds none."""
        if not self.trust:
            return ()
        from ebjdat_serve.signing import trusted_keys  # cryptography costs 100 ms and memory

        return trusted_keys(self.trust)

    def profile_for(self, scope: Mapping[str, Any]) -> Profile:
        """Return the profile of the answer to a request's ASGI scope: a key of scope ``operate`` is told everything."""
        return "full" if OPERATE in scope.get("scopes", ()) else self.profile


SETTINGS = declared(Settings)
VERIFIED_BY = ("engine", "device", "precision", "calibration", "alpha", "review_share", "trust")
"""The settings that decide whether a server accepts a bundle; commands that publish take them, too."""


def add_arguments(parser: argparse.ArgumentParser, only: Collection[str] = ()) -> None:
    """Add an option for every setting to ``parser``, by groups; with ``only``, for those of these names."""
    chosen = [one for one in SETTINGS if not only or one.name in only]
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(one.about.group for one in chosen)}
    for one in chosen:
        one.add_to(groups[one.about.group])


def settings_of(options: argparse.Namespace, environment: Mapping[str, str], only: Collection[str] = ()) -> Settings:
    """Return the settings of a command line and the variables in ``environment``; with ``only``, of these names.

    Raises EbjdatError that names what is wrong.
    """
    values: dict[str, Any] = {}
    for one in SETTINGS if not only else [one for one in SETTINGS if one.name in only]:
        if (given := getattr(options, one.name, None)) is not None:
            values[one.name] = tuple(given) if isinstance(given, list) else given
        elif text := environment.get(one.variable):
            values[one.name] = one.parse(text)
    return Settings(**values)


def table() -> str:
    """Return all settings as a table in Markdown."""
    lines = [f"| `{one.flag}` | `{one.variable}` | {one.default_text} | {one.about.unit} | {one.about.help} |" for one in SETTINGS]
    return "\n".join(["| option of `serve` | variable | default | unit | |", "|---|---|---|---|---|", *lines])
