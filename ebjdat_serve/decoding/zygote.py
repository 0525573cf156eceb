"""The process that forks decoders, and what a decoder does: ``python -m ebjdat_serve.decoding.zygote FD``.

It has loaded NumPy, Pillow and its plugins, has one thread, and holds no socket but the one to the HTTP process, so that a fork takes
milliseconds and a decoder inherits nothing. It ends when the HTTP process hangs up, and its decoders end with it.
"""

import ctypes
import gc
import math
import os
import pickle
import resource
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from typing import NoReturn

import numpy as np

from ebjdat_serve import pixels
from ebjdat_serve.contract import Input
from ebjdat_serve.decoding import wire
from ebjdat_serve.decoding.header import Bytes, Header, Limits
from ebjdat_serve.decoding.judge import accepted, each, judge, judge_all
from ebjdat_serve.errors import InvalidImage

NICE = 10
"""How much decoders of large images stand back behind all else."""
IDLE_MEMORY = 96 * 2**20
"""Bytes above what it starts with that a decoder may use for small images, or to judge a large one."""
SLACK = 1.25
"""How much more memory a decode may use than was estimated."""
RESULT_BYTES = 9
"""Bytes of each pixel of an image that is decoded: itself, its copy, and that in the answer to all of a list."""
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


def main() -> None:
    """Fork decoders as the HTTP process orders, and tell it of those that end."""
    line = socket.socket(fileno=int(sys.argv[1]))
    limits = pickle.loads(line.recv(2**16))  # from the process that started this one
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the HTTP process says when to end
    prepare()
    ended, wake = socket.socketpair()
    for end in (ended, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    pids: dict[int, int] = {}
    try:
        while True:
            readable, _, _ = select.select([line, ended], [], [])
            if ended in readable:
                with suppress(BlockingIOError):
                    ended.recv(4096)
                reap(line, pids)
            if line in readable and not obey(line, limits, pids, (ended, wake)):
                return
    finally:
        signal.set_wakeup_fd(-1)  # decoders end now, when its other end may be closed


def obey(line: socket.socket, limits: Limits, pids: dict[int, int], others: tuple[socket.socket, ...]) -> bool:
    """Fork or kill a decoder, as the next order says; return whether there was one. ``pids`` are those of decoders, with their numbers."""
    message, descriptors, _, _ = socket.recv_fds(line, wire.ORDER.size, 1)
    if not message:
        return False
    what, number, large = wire.ORDER.unpack(message)
    if what == wire.KILL:
        for pid in [pid for pid, known in pids.items() if known == number]:
            os.kill(pid, signal.SIGKILL)
        return True
    if not (pid := os.fork()):
        signal.set_wakeup_fd(-1)
        for end in (line, *others):
            end.close()
        be_a_decoder(socket.socket(fileno=descriptors[0]), limits, large)
    os.close(descriptors[0])
    pids[pid] = number
    line.send(wire.NEWS.pack(number, -1))
    return True


def prepare() -> None:
    """Load what decoders need, so that none loads it again."""
    warnings.simplefilter("ignore")  # Pillow's, of each strange tag of each image
    for kind in accepted():
        pixels.register(kind)
    import_module("PIL.MpoImagePlugin")  # for JPEGs that hold others
    small, contract = pixels.encode_png(np.zeros((8, 8, 3), np.uint8)), Input(8, 8)
    pixels.decode_judged(small, judge(small, contract, Limits()), contract)
    gc.collect()
    gc.freeze()


def reap(line: socket.socket, pids: dict[int, int]) -> None:
    """Tell the HTTP process of the decoders that have ended."""
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        line.send(wire.NEWS.pack(pids.pop(pid), status))


def be_a_decoder(line: socket.socket, limits: Limits, large: bool) -> NoReturn:
    """Decode until the HTTP process hangs up."""
    status = 1
    try:
        parent = os.getppid()
        prctl = ctypes.CDLL(None).prctl
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        hush()
        for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
            resource.setrlimit(kind, (0, 0))
        with suppress(OSError):  # so that memory that is short costs a decoder before it costs a worker
            write("/proc/self/oom_score_adj", "900")
        with suppress(OSError):
            write("/proc/self/comm", "ebjdat-decode")  # for ps and top
        if large:
            os.nice(NICE)
        if os.getppid() == parent:  # else the zygote ended before the first line above
            Decoder(line, limits).run()
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def hush() -> None:
    """Keep the standard error for our own words: libtiff writes a line there for each damaged row of a fax."""
    own = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    sys.stderr = os.fdopen(own, "w", buffering=1, encoding="utf-8")


class Decoder:
    """One process, one image at a time."""

    def __init__(self, line: socket.socket, limits: Limits) -> None:
        self.line, self.limits = line, limits
        self.base = address_space()
        self.restrict(IDLE_MEMORY)

    def run(self) -> None:
        """Serve until the other end hangs up."""
        while True:
            self.answer()  # in a call of its own: nothing of a message is held while the next one comes

    def answer(self) -> None:
        """Receive images, with memory for them, and answer."""
        message = wire.receive(self.line, lambda n: self.restrict(IDLE_MEMORY + n))
        assert isinstance(message, wire.Work)
        if message.headers:
            self.allow_time()
            self.line.sendall(wire.encode_results(*self.decode(message, message.headers)))
        else:
            self.judge_first(message)

    def judge_first(self, work: wire.Work) -> None:
        """Say what the images need, and decode them if there is memory for it."""
        self.allow_time()
        try:
            headers = judge_all(work.images, work.contract, self.limits)
            pairs = iter(zip(headers, work.images, strict=True))
            need = max(each(work.images, lambda _: self.need(*next(pairs), work.contract)))
            need += RESULT_BYTES * (len(headers) - 1) * work.contract.height * work.contract.width
            if need > self.limits.max_memory:
                said = f"the images of one list take about {need // 2**20} MiB to decode; the limit is {self.limits.max_memory // 2**20}"
                raise InvalidImage(f"{said}: send them one by one", too_large=True)
        except InvalidImage as error:
            self.line.sendall(wire.encode_plan(error))
            return
        self.line.sendall(wire.encode_plan(need))
        answer = wire.receive(self.line)
        if isinstance(answer, wire.Go):
            self.restrict(int(SLACK * answer.memory) + IDLE_MEMORY + sum(work.lengths))
            results, seconds = self.decode(work, headers)
            gc.collect()  # what an error held in a circle
            self.restrict(IDLE_MEMORY)
            self.line.sendall(wire.encode_results(results, seconds))

    def need(self, header: Header, data: Bytes, contract: Input) -> int:
        """Return how much memory an image needs with its encoded bytes. Raises InvalidImage: more than there ever is."""
        need = header.memory(contract, self.limits) + 3 * len(data)
        if need > self.limits.max_memory:
            said = f"the {header.format} takes about {need // 2**20} MiB to decode; the limit is {self.limits.max_memory // 2**20}"
            raise InvalidImage(f"{said}: send it smaller", too_large=True)
        return need

    def decode(self, work: wire.Work, headers: tuple[Header, ...]) -> tuple[list[wire.Decoded], list[float]]:
        """Return the image or the error of each, and the processor time that it took."""
        results: list[wire.Decoded] = []
        times = [time.thread_time()]
        for data, header in zip(work.images, headers, strict=True):
            if not work.headers:
                self.allow_time()  # for each; small ones take none to speak of
            try:
                scale = header.scale(work.contract, self.limits)
                results.append(pixels.decode_judged(bytes(data), header, work.contract, scale))
            except InvalidImage as error:
                # this one holds no frame, and so nothing of what was being decoded
                results.append(InvalidImage(str(error), too_large=error.too_large))
            times.append(time.thread_time())
        return results, [end - begin for begin, end in pairwise(times)]

    def restrict(self, memory: int) -> None:
        """Let this process have ``memory`` bytes more than it started with."""
        limit(resource.RLIMIT_AS, self.base + memory)

    def allow_time(self) -> None:
        """Let this process run for the seconds of one decode from now on; the limit is of whole seconds, and kills."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + self.limits.max_seconds))


def limit(kind: int, value: int) -> None:
    """Set a limit of this process, within the hard one that it was started with: ``ulimit`` or systemd may have set that."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def address_space() -> int:
    """Return the bytes of this process's address space."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def write(path: str, text: str) -> None:
    """Write to a file of /proc."""
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


if __name__ == "__main__":
    with suppress(ConnectionError):  # the HTTP process has gone, with orders or news on the way
        main()
