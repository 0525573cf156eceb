"""What an operator may set, and the limits that every request meets."""

from dataclasses import dataclass
from pathlib import Path

from ebjdat_serve.engines import Device, EngineKind, Precision
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.logs import Style

SHIPPED = Path(__file__).parent.parent / "models" / "cifar10"
TIMES = {
    "classify_deadline": "seconds until a classify or energy request is answered 504",
    "generate_deadline": "seconds until a generate request is answered 504",
    "worker_timeout": "seconds without a word after which a worker that owes an answer is killed and replaced",
    "graceful_timeout": "seconds that requests, but for drawings, get to end after a stop signal",
    "generate_graceful_timeout": "seconds that drawings get",
}
"""The times that an operator may set, and what they are."""


@dataclass(frozen=True)
class Settings:
    """Lengths in bytes, times in seconds."""

    model: Path = SHIPPED
    host: str = "127.0.0.1"
    port: int = 8000
    engine: EngineKind = "auto"
    device: Device = "auto"
    precision: Precision = "fp32"
    alpha: float = 0.05
    threads: int = 1  # per worker process
    log: Style = "text"

    trust: tuple[Path, ...] = ()  # public keys; with any, a bundle must be signed by one of them

    classify_workers: int = 1
    generate_workers: int = 1  # 0: no /generate, and less memory

    max_body: int = 22 * 2**20  # an image of the largest size still fits as base64
    max_images: int = 64  # in one JSON list
    max_samples: int = 64  # n of one /generate
    max_steps: int = 0  # of one /generate; 0: the bundle's own number, the horizon its sampler was tuned for
    max_work: int = 8000  # n x steps of one /generate
    max_streamed: int = 16  # n of one stream
    max_previews: int = 20  # of one stream
    max_scale: int = 16
    max_sheet: int = 2**24  # pixels of one PNG
    classify_queue: int = 256  # requests in flight beyond which the answer is 503
    generate_queue: int = 256
    generate_chains: int = 128  # chains under way beyond which the answer is 429
    generate_backlog: float = 60.0  # estimated seconds of work under way beyond which the answer is 429
    classify_deadline: float = 10.0
    generate_deadline: float = 120.0
    max_batch: int = 32
    worker_timeout: float = 30.0  # without a word, owing an answer, after which a worker is taken for hung and killed
    graceful_timeout: float = 6.0  # that requests get to end after a stop signal, but for drawings
    generate_graceful_timeout: float = 50.0  # that drawings get

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("classify_workers", 1), ("generate_workers", 0), ("max_steps", 0)):
            if getattr(self, name) < least:
                raise EbjdatError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        for name in TIMES:
            if not 0 < getattr(self, name) < float("inf"):
                raise EbjdatError(f"--{name.replace('_', '-')} must be seconds above 0, not {getattr(self, name)}")
