"""Soak test under mixed load and attack, with workers killed at random and a changing store: stated errors, no wrong response, no leak."""

import base64
import io
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from ebjdat_serve import keys, pixels
from ebjdat_serve.engines import load_engine
from ebjdat_serve.generation import generate
from ebjdat_serve.server.compute.model import Model
from ebjdat_serve.server.settings import SHIPPED, Settings
from ebjdat_serve.sgld import Prior
from ebjdat_serve.store import publish, rollback
from tests.attackers import ANSWERED, Attackers
from tests.conftest import serving
from tests.test_faults import workers
from tests.test_keys import key_of
from tests.test_refresh import copied

STATED = {503: "died", 429: "try again"}
"""What may be answered instead of 200 to a good request, and a word of it."""
GROWTH, GROWTH_OF_WORKERS, ONCE = 2.0, 8.0, 12.0
"""MB a minute that a process may grow in the last quarter of a long soak, in whose second half no worker is killed: a worker that opens one
bundle after another grows for some ten of them, by the allocator's fragments, and then no more. ONCE: the MB that it may still keep of
those, of bodies on their way, and of the largest image that a decoder has had (7 were seen), in a soak of less than ten minutes."""

LONG = 100.0
"""Seconds of a soak that must have seen all that is ANSWERED."""
OPTIONS = ("--device", "cpu", "--client-requests", "32", "--client-bodies", "16", "--client-chains", "64")


class Expected:
    """What the engine says when it is alone: images and drawings, by number."""

    def __init__(self, test_images):
        folder = SHIPPED
        self.model = Model(folder, Settings(device="cpu", threads=1))
        engine, prior = load_engine(self.model.bundle, "onnx", "cpu"), Prior.load(folder / "prior.safetensors")
        images = test_images[0][::25]
        self.pictures = [pixels.encode_png(image) for image in images]
        said = self.model.predict(images)
        self.energy, self.p_value = said.energy.tolist(), said.p_value.tolist()
        self.joint, self.top = said.joint_energy.tolist(), said.probability.argmax(1).tolist()
        self.jobs = [{"class": seed % 10, "n": 1 + seed % 3, "steps": 1 + 3 * (seed % 7), "seed": 100 * seed} for seed in range(12)]
        self.drawn = []
        for job in self.jobs:
            sampler = self.model.bundle.manifest.sampler.__class__(**{**vars(self.model.bundle.manifest.sampler), "steps": job["steps"]})
            label = np.full(job["n"], job["class"], np.int64)
            self.drawn.append(generate(engine, prior, sampler, label, job["seed"]).image)


class Soak:
    """Threads that ask and check, and the tally of what they saw."""

    def __init__(self, server, expected, seconds, key, attackers):
        self.server, self.expected, self.key, self.attackers = server, expected, key, attackers
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.statuses, self.wrong = Counter(), []

    def run(self, kinds):
        threads = [threading.Thread(target=self.client, args=(kind, seed)) for seed, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        return threads

    def client(self, kind, seed):
        dice = random.Random(seed)
        with httpx2.Client(timeout=130, headers={"X-API-Key": self.key}) as client:
            while time.monotonic() < self.end:
                try:
                    if kind in Attackers.KINDS:
                        getattr(self.attackers, kind)(dice)
                    else:
                        getattr(self, kind)(client, dice)
                except Exception as error:  # noqa: BLE001  a thread that dies would make the rest of the soak say nothing
                    self.wrong.append(f"{kind}: {error!r}")

    def good(self, kind, answer):
        """Whether an answer is 200; count it, and note what is neither that nor a stated error."""
        self.statuses[kind, answer.status_code] += 1
        if answer.status_code == 200:
            return True
        if STATED.get(answer.status_code, "\0") not in answer.text or "retry-after" not in answer.headers:
            self.wrong.append(f"{kind}: {answer.status_code} {answer.text}")
        return False

    def classify(self, client, dice):
        i = dice.randrange(len(self.expected.pictures))
        answer = client.post(f"{self.server.url}/classify", content=self.expected.pictures[i])
        if self.good("classify", answer):
            said = answer.json()
            if (said["class"], said["energy"], said["p_value"]) != (
                self.expected.top[i],
                self.expected.energy[i],
                self.expected.p_value[i],
            ):
                self.wrong.append(f"image {i}: {said}")

    def energies(self, client, dice):
        chosen = [dice.randrange(len(self.expected.pictures)) for _ in range(dice.randint(1, 40))]
        images = [base64.b64encode(self.expected.pictures[i]).decode() for i in chosen]
        answer = client.post(f"{self.server.url}/energy", json={"images": images})
        if self.good("energy", answer) and [one["joint_energy"] for one in answer.json()["results"]] != [
            self.expected.joint[i] for i in chosen
        ]:
            self.wrong.append(f"list {chosen}")

    def draw(self, client, dice):
        i = dice.randrange(len(self.expected.jobs))
        answer = client.get(f"{self.server.url}/generate", params={**self.expected.jobs[i], "format": "json"})
        if self.good("draw", answer):
            self.check_drawn(i, answer.json())

    def stream(self, client, dice):
        i = dice.randrange(len(self.expected.jobs))
        answer = client.get(f"{self.server.url}/generate", params={**self.expected.jobs[i], "stream": True, "every": 5})
        events = [part for part in answer.text.split("\n\n") if part.startswith("event: ")] if answer.status_code == 200 else []
        if events and events[-1].startswith("event: done"):
            self.statuses["stream", 200] += 1
            self.check_drawn(i, json.loads(events[-1].split("data: ", 1)[1]))
        elif events and "died" in events[-1]:
            self.statuses["stream", 503] += 1
        else:
            self.good("stream", answer)
            self.wrong.extend([f"stream: {answer.text[-300:]}"] if answer.status_code == 200 else [])

    def check_drawn(self, i, said):
        for one, expected in zip(said["images"], self.expected.drawn[i], strict=True):
            with Image.open(io.BytesIO(base64.b64decode(one["png"]))) as picture:
                if not np.array_equal(np.asarray(picture), expected):
                    self.wrong.append(f"drawing {i}")

    def bad(self, client, dice):
        body, status = dice.choice([(b"junk", 422), (b"", 422), (self.expected.pictures[0][:100], 422), (b"x" * 20_000_000, 413)])
        answer = client.post(f"{self.server.url}/classify", content=body)
        self.statuses["bad", answer.status_code] += 1
        if answer.status_code != status:
            self.wrong.append(f"bad: {answer.status_code} {answer.text}")
        time.sleep(0.2)

    def leave(self, _, dice):
        """Ask for much, and go away: in the middle of the body, or of the wait."""
        host, port = self.server.url.removeprefix("http://").split(":")
        key = b"X-API-Key: %b\r\n" % self.key.encode()
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: 5000\r\n\r\nhalf"
        long = b"GET /generate?class=1&n=4&steps=80 HTTP/1.1\r\nHost: x\r\n" + key + b"\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(dice.choice([head, long, long.replace(b"steps", b"stream=true&steps")]))
            time.sleep(dice.uniform(0.05, 0.5))
        self.statuses["leave", 0] += 1


def resident(pid):
    """MB of memory, and open files, of a process; None when it is gone."""
    try:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, StopIteration):
        return None


def soak(tmp_path, test_images, seconds, kills_every, calm=0.0):
    """Return what each process took, as (seconds, MB, open files), and the workers that were left at the end."""
    expected, store, file = Expected(test_images), tmp_path / "store", tmp_path / "keys.json"
    for version in ("one", "two"):
        publish(copied(SHIPPED, tmp_path / version, version=version), store)
    scopes = {"scopes": frozenset(keys.SCOPES)}
    secrets = {name: keys.new(file, key_of(name).model_copy(update=scopes)) for name in ("polite", *Attackers.KINDS)}
    with serving(store, tmp_path / "log", "--keys", str(file), "--max-steps", "80", *OPTIONS) as server:
        run = Soak(server, expected, seconds, secrets["polite"], Attackers(server.url, secrets))
        threads = run.run(["classify"] * 3 + ["energies", "draw", "draw", "stream", "bad", "leave", *Attackers.KINDS])
        killed, seen = chaos(run, store, kills_every, calm)
        for thread in threads:
            thread.join(140)
            assert not thread.is_alive()
        these_work = set(workers(server))
        left = httpx2.get(f"{server.url}/info", timeout=30, headers={"X-API-Key": run.key}).json()["load"]
    verdict(run, killed, left)
    return seen, these_work


def chaos(run, store, kills_every, calm):
    """Kill workers until the last ``calm`` seconds, and move the store's current version; return the number killed and ``seen``."""
    dice, killed, seen = random.Random(0), 0, defaultdict(list)
    next_kill, next_roll = run.began + kills_every, run.began + kills_every
    while time.monotonic() < run.end:
        time.sleep(1)
        for pid in [run.server.process.pid, *run.server.children()]:
            if found := resident(pid):
                seen[pid].append((time.monotonic() - run.began, *found))
        if time.monotonic() > next_kill and run.end - time.monotonic() > calm:
            if alive := workers(run.server):
                os.kill(dice.choice(alive), signal.SIGKILL)
                killed += 1
            next_kill += dice.uniform(0.5, 1.5) * kills_every
        # in a short soak none late: a worker that still draws by the version before has both open, and memory that looks like growth
        if time.monotonic() > next_roll and (run.end - run.began >= 600 or run.end - time.monotonic() > 0.8 * calm):
            rollback(store)
            next_roll += kills_every
    return killed, seen


def verdict(run, killed, left):
    """Assert that all answers were right or refusals as stated, that none of a kind is missing, and that nothing is left to do."""
    answers, wrong = run.attackers.answers, run.attackers.wrong
    print(f"\n{run.end - run.began:.0f} s, {killed} workers killed: {dict(sorted(run.statuses.items()))}")
    print(f"the attackers: {dict(sorted(answers.items()))}")
    assert not run.wrong, (Counter(said.split(":")[0] for said in run.wrong), run.wrong[:5])
    assert not wrong, Counter(wrong)
    assert {kind for kind, _ in answers} == set(Attackers.KINDS), answers
    if run.end - run.began >= LONG:
        assert set(answers) >= ANSWERED, ANSWERED - set(answers)
    assert killed >= 1
    for kind in ("classify", "energy", "draw", "stream"):
        assert run.statuses[kind, 200] > 5, (kind, run.statuses)
        assert run.statuses[kind, 503] <= 8 * killed, (kind, run.statuses)
    assert (left["classify"]["requests"], left["generate"]["requests"], left["generate"]["chain_steps_left"]) == (0, 0, 0)


@pytest.mark.slow
def test_no_answer_is_lost_or_wrong_and_nothing_grows(tmp_path, test_images, pytestconfig):
    """As long as --soak says; only ten minutes (make soak) tell growth from the fragments of an allocator."""
    seconds = pytestconfig.getoption("soak")
    seen, these_work = soak(tmp_path, test_images, seconds, kills_every=min(20, seconds / 12), calm=0.5 * seconds)
    for pid, rows in seen.items():
        at, memory, files = (np.array(column) for column in zip(*rows, strict=True))
        late = at > 0.75 * seconds  # workers that were started last have had the time to grow to what they need
        if late.sum() > 0.2 * seconds:
            # floors, since large bodies on their way, and a second bundle, are tens of MB for a moment
            first, second = np.array_split(memory[late], 2)
            slope = (np.percentile(second, 10) - np.percentile(first, 10)) / ((at[late][-1] - at[late][0]) / 60 / 2)
            print(f"process {pid}: {memory[late].mean():.0f} MB, {slope:+.2f} MB a minute, {files[late].max()} files at most")
            # what an allocator keeps once, and bodies on their way, are a slope in a short soak, and none in ten minutes
            once = ONCE / ((at[late][-1] - at[late][0]) / 60 / 2) if seconds < 600 else 0.0
            assert slope - once < (GROWTH_OF_WORKERS if pid in these_work else GROWTH)
            assert files[late].max() < 100
