"""Tests of training's robustness: bad gradients, bad checkpoints, deadlines, a second process, changed data, bad settings."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.card import Baseline
from tests.conftest import ROOT
from training.card import card
from training.config import stages, together
from training.data.datasets import load, load_extra
from training.errors import DataError, OutOfTime, TrainingDiverged, TrainingError
from training.loop.bundle_writer import Origin, draft_bundle
from training.loop.clock import Clock
from training.loop.loop import train
from training.loop.run_log import RunLogger
from training.loop.start import new_state
from training.loop.state import Position, State, load_position, load_weights, previous, save_weights
from training.overrides import override
from training.presets import DIGITS, preset
from training.pseudo_label import pseudo_label
from training.refresh import lock, reached, refresh

CPU = torch.device("cpu")
WARM = stages(DIGITS)[0]
LOOP = sys.modules["training.loop.loop"]


class Ticks(Clock):
    """A clock that runs out, or is interrupted, after so many questions."""

    def __init__(self, ticks, *, interrupt=False):
        super().__init__()
        self.ticks, self.wants = ticks, interrupt

    def over(self):
        self.ticks -= 1
        if self.ticks < 0 and self.wants:
            self.interrupted = True
        return self.ticks < 0 or self.interrupted

    def allot(self, share):
        pass


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    real, calls = LOOP.descend, []

    def poisoned(model, *rest):
        terms = real(model, *rest)
        calls.append(terms)
        if len(calls) == 12:  # the loss is finite, one gradient is not
            next(iter(model.parameters())).grad[0] = float("nan")
        return terms

    monkeypatch.setattr(LOOP, "descend", poisoned)
    weights = train(replace(WARM, epochs=1.5, save_seconds=0.0), load("digits"), tmp_path, init=None, clock=Clock(), device=CPU)
    assert load_position(tmp_path / "state.pt").rollbacks == 1
    assert all(torch.isfinite(value).all() for value in load_weights(weights).values())
    assert '"gradient": "nan"' in (tmp_path / "log.jsonl").read_text()


@pytest.mark.slow
def test_a_state_that_was_bad_when_it_was_saved_sends_the_run_back_once_more(tmp_path, monkeypatch):
    """Every step from a saved state on diverges until the run returns to the state before it."""
    real, restored = LOOP.diverged, []
    bad = []

    def judged(row, stage, spare):
        bad.append(row)
        return len(bad) in (13, 14) or real(row, stage, spare)

    usual = State.restore
    monkeypatch.setattr(LOOP, "diverged", judged)
    monkeypatch.setattr(State, "restore", lambda self, path: (restored.append(path.name), usual(self, path))[1])
    train(replace(WARM, epochs=1.5, save_seconds=0.0), load("digits"), tmp_path, init=None, clock=Clock(), device=CPU)
    assert restored == ["state.pt", previous(tmp_path / "state.pt").name]
    assert load_position(tmp_path / "state.pt").rollbacks == 2


@pytest.mark.slow
def test_too_many_divergences_exit_with_an_error_and_a_code(tmp_path):
    command = [sys.executable, str(ROOT / "training" / "train.py"), "jem++", "--data", "digits", "--threads", "1", "--run", "wild"]
    done = subprocess.run(
        [*command, "--only-train", "--set", "energy_gap_limit=1e-9", "chains.steps=1", "--set", "rollbacks=1"],
        env={**os.environ, "EBJDAT_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "diverged 2 times" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_stage_two_begins_with_the_warm_start_that_was_finished_after_all(tmp_path):
    stage = replace(DIGITS, epochs=0.2, lr=0.0, warm_start=replace(WARM, epochs=1.0))
    with pytest.raises(OutOfTime, match="the time ran out before digits began"):
        refresh(stage, tmp_path / "run", init=None, clock=Ticks(5), suite=None, device=CPU)  # time for half of the warm start
    half = load_weights(tmp_path / "run" / "digits-fgsm" / "weights.safetensors")
    refresh(stage, tmp_path / "run", init=None, clock=Clock(), suite=None, device=CPU)
    whole = load_weights(tmp_path / "run" / "digits-fgsm" / "weights.safetensors")
    end = load_weights(tmp_path / "run" / "digits" / "weights.safetensors")  # at rate 0 it is what it began with
    assert not torch.equal(half["stem.weight"], whole["stem.weight"])
    torch.testing.assert_close(end["stem.weight"], whole["stem.weight"], rtol=1e-5, atol=1e-6)


def test_an_interrupt_at_the_last_step_loses_nothing(tmp_path):
    stage = replace(WARM, epochs=1.0)
    with pytest.raises(KeyboardInterrupt):
        refresh(stage, tmp_path / "run", init=None, clock=Interrupting(), suite=None, device=CPU)
    assert load_position(tmp_path / "run" / "digits-fgsm" / "state.pt").step == 17
    weights = refresh(stage, tmp_path / "run", init=None, clock=Clock(), suite=None, device=CPU)
    assert weights.is_file()


@pytest.mark.slow
def test_a_killed_recipe_of_two_averaged_runs_goes_on_to_the_same_mean(tmp_path):
    fgsm, start = replace(WARM, epochs=0.3), replace(WARM, name="start", epochs=0.2)
    other = replace(DIGITS, name="other", warm_start=None, epochs=0.2, lr=0.01)
    stage = replace(DIGITS, epochs=0.2, warm_start=replace(start, warm_start=fgsm), averaged_with=other)
    assert [each.name for each in stages(stage)] == ["digits-fgsm", "start", "other", "digits"]
    whole = refresh(stage, tmp_path / "whole", init=None, clock=Clock(), suite=None, device=CPU)
    for ticks in (8, 5):  # within the second warm start, and within the first of the two runs
        with pytest.raises(KeyboardInterrupt):
            refresh(stage, tmp_path / "run", init=None, clock=Ticks(ticks, interrupt=True), suite=None, device=CPU)
    again = refresh(stage, tmp_path / "run", init=None, clock=Clock(), suite=None, device=CPU)
    own, its, mean = (
        load_weights(tmp_path / "run" / name)
        for name in ("digits/weights.safetensors", "other/weights.safetensors", "digits/averaged.safetensors")
    )
    for name, value in load_weights(whole).items():
        assert torch.equal(mean[name], value)
        torch.testing.assert_close(mean[name], (own[name] + its[name]) / 2, rtol=1e-6, atol=1e-7)
    assert again == tmp_path / "run" / "digits" / "averaged.safetensors"
    assert not torch.equal(own["stem.weight"], its["stem.weight"])
    (tmp_path / "run" / "other" / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"other.weights.safetensors is damaged .* delete it"):
        refresh(stage, tmp_path / "run", init=None, clock=Clock(), suite=None, device=CPU)
    (tmp_path / "run" / "other" / "weights.safetensors").unlink()
    refresh(stage, tmp_path / "run", init=None, clock=Clock(), suite=None, device=CPU)
    assert torch.equal(load_weights(again)["stem.weight"], mean["stem.weight"])
    first = tmp_path / "run" / "start" / "weights.safetensors"
    branched = refresh(stage, tmp_path / "branched", init=first, clock=Clock(), suite=None, device=CPU)  # both runs begin with the file
    assert torch.equal(load_weights(branched)["stem.weight"], mean["stem.weight"])


def test_what_starts_from_averaged_runs_starts_from_their_mean(tmp_path):
    """At rate 0 a stage ends with what it began with."""
    pair = replace(WARM, name="pair", epochs=0.2, averaged_with=replace(WARM, name="half", epochs=0.2, lr=0.01))
    stage = replace(
        DIGITS, epochs=0.2, lr=0.0, warm_start=pair, averaged_with=replace(DIGITS, name="other", warm_start=None, epochs=0.2, lr=0.0)
    )
    todo = stages(stage)
    assert [each.name for each in todo] == ["half", "pair", "other", "digits"]
    assert [together(todo, i) for i in range(4)] == [range(2), range(2), range(2, 4), range(2, 4)]
    refresh(stage, tmp_path, init=None, clock=Clock(), suite=None, device=CPU)
    mean = load_weights(tmp_path / "pair" / "averaged.safetensors")["stem.weight"]
    for name in ("digits/weights.safetensors", "other/weights.safetensors", "digits/averaged.safetensors"):
        torch.testing.assert_close(load_weights(tmp_path / name)["stem.weight"], mean, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(load_weights(tmp_path / "pair" / "weights.safetensors")["stem.weight"], mean, rtol=1e-3)


def test_the_second_of_two_averaged_runs_leaves_the_first_to_be_continued(tmp_path):
    stage = replace(WARM, name="pair", epochs=0.3, averaged_with=replace(WARM, name="half", epochs=0.5))
    todo = stages(stage)

    class Uneven(Ticks):
        """Three steps for the first run, and as many as it wants for the second."""

        def allot(self, share):
            self.ticks = 3 if share < 1 else 99

    for clock, steps in ((Uneven(0), [3, 6]), (Clock(), [9, 6])):
        mean = load_weights(refresh(stage, tmp_path, init=None, clock=clock, suite=None, device=CPU))["stem.weight"]
        assert [load_position(tmp_path / each.name / "state.pt").step for each in todo] == steps
        assert reached(todo, 1, tmp_path).step == sum(steps)
        own, its = (load_weights(tmp_path / name / "weights.safetensors")["stem.weight"] for name in ("pair", "half"))
        torch.testing.assert_close(mean, (own + its) / 2, rtol=1e-6, atol=1e-7)


def test_recipes_that_cannot_be_run_are_refused():
    other = replace(WARM, name="other")
    with pytest.raises(ValueError, match="different names"):
        replace(DIGITS, averaged_with=replace(other, name="digits"))
    with pytest.raises(ValueError, match="two runs are averaged"):
        replace(DIGITS, averaged_with=replace(other, averaged_with=replace(WARM, name="third")))


class Interrupting(Clock):
    """Ctrl-C during the last step."""

    calls = 0

    def over(self):
        self.calls += 1
        if self.calls == 17:
            os.kill(os.getpid(), signal.SIGINT)
            return False
        return super().over()


def test_a_run_is_not_continued_on_other_data_nor_by_two_at_once(tmp_path, monkeypatch):
    stage = replace(WARM, epochs=0.3)
    refresh(stage, tmp_path / "run", init=None, clock=Clock(), suite=None, device=CPU)
    data = load("digits")
    changed = replace(data, sha256="0" * 64)
    monkeypatch.setattr("training.refresh.load", lambda *_: changed)
    with pytest.raises(TrainingError, match="another configuration or data"):
        refresh(stage, tmp_path / "run", init=None, clock=Clock(), suite=None, device=CPU)
    with lock(tmp_path / "held"), pytest.raises(TrainingError, match="another process holds"), lock(tmp_path / "held"):
        pass
    with lock(tmp_path / "held"):
        pass


def test_a_damaged_state_and_absent_weights_name_what_to_do(tmp_path):
    state = new_state(WARM, load("digits"), None, CPU)
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(TrainingError, match=r"state\.previous\.pt"):
        state.restore(tmp_path / "state.pt")
    with pytest.raises(TrainingError, match="does not exist"):
        refresh(WARM, tmp_path / "run", init=tmp_path / "absent.safetensors", clock=Clock(), suite=None, device=CPU)


@pytest.mark.parametrize(
    "setting",
    [
        "depth=12", "width=0", "batch_size=0", "lr=-1", "epochs=inf", "schedule=cos", "augment=foo", "precision=half", "optimiser=lion",
        "eps=-0.1", "eps=inf", "inner=foo", "alignment=foo", "attack.start=foo", "attack.steps=-1", "prior=gauss", "size=30", "lr_peak=1",
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_runs(setting):
    with pytest.raises(TrainingError, match=f"--set {setting}"):
        override(DIGITS, [setting])


def test_bad_settings_that_need_the_data_are_refused_too(tmp_path):
    for settings, said in (({"padding": 9}, "padding=9"), ({"batch_size": 5000}, "batch_size=5000")):
        with pytest.raises(TrainingError, match=said):
            train(replace(WARM, **settings), load("digits"), tmp_path, init=None, clock=Clock(), device=CPU)
    for settings in (["window=0"], ["cap=-1"], ["seeds="]):
        with pytest.raises(TrainingError, match="window must be"):
            override(preset("dat", "digits"), settings)
    with pytest.raises(DataError, match="not a folder of images"):
        new_state(override(preset("dat", "digits"), [f"seeds={ROOT / 'README.md'}"]), load("digits"), None, CPU)


def test_the_log_is_json_whatever_the_numbers_and_a_cut_line_stands_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "lo')
    watch = RunLogger(tmp_path, WARM, 10, 0, writes=True, tensorboard=False)
    watch.write({"step": 2, "loss": float("inf"), "accuracy": 0.5})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1]) == {"step": 2, "loss": "inf", "accuracy": 0.5}


def test_the_card_says_what_was_trained_and_no_path(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("ash", "birch"):
        (tmp_path / "secret" / "trees" / name).mkdir(parents=True)
        for i in range(120):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "secret" / "trees" / name / f"{i}.png")
    folder = str(tmp_path / "secret" / "trees")
    data = load(folder)
    stage = override(preset("standard", "small", folder), ["depth=10", "width=1", "batch_size=32"])
    assert stage.name == "trees-standard"
    save_weights(new_state(stage, data, None, CPU).model.state_dict(), tmp_path / "w.safetensors")
    bundle = draft_bundle(
        tmp_path / "w.safetensors", stage, data, tmp_path / "bundle", Origin("a" * 40 + "-dirty", "now", ""), Position(5, 1.0, 2), 10
    )
    text = card(bundle, [], Baseline()) + (tmp_path / "bundle" / "bundle.json").read_text()
    assert "secret" not in text
    for said in ("method Standard", "aaaaaaaaaaaa-dirty", "rolled back for divergence 2 times", "its licence is for you to state"):
        assert said in text
    for unsaid in ("FGSM", "CIFAR-10"):
        assert unsaid not in card(bundle, [], Baseline())


@pytest.mark.slow
def test_pseudo_labels_are_the_classifiers_and_of_its_classes(golden, tmp_path):
    data = load("digits")
    np.savez(tmp_path / "drawn.npz", image=data.test.image[:60])
    bundle = Bundle.load(golden)
    image, label = pseudo_label(str(tmp_path / "drawn.npz"), bundle, least=0.0)
    assert (label == data.test.label[:60]).mean() > 0.85
    sure, _ = pseudo_label(str(tmp_path / "drawn.npz"), bundle, least=0.6)
    assert 0 < len(sure) < 60
    script = [sys.executable, str(ROOT / "training" / "pseudo_label.py"), str(tmp_path / "drawn.npz"), str(golden)]
    subprocess.run([*script, "-o", str(tmp_path / "extra.npz")], check=True, capture_output=True)
    extra = load_extra(str(tmp_path / "extra.npz"), data)
    np.testing.assert_array_equal(extra.image, image)
    with pytest.raises(DataError, match="labelled for the classes"):
        load_extra(str(tmp_path / "extra.npz"), replace(data, names=tuple("abcdefghij")))
    with pytest.raises(DataError, match="lower --least"):
        pseudo_label(str(tmp_path / "drawn.npz"), bundle, least=1.1)


def test_signals_act_as_usual_again_however_training_ends(tmp_path, monkeypatch):
    usual = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(LOOP, "diverged", lambda *_: True)
    with pytest.raises(TrainingDiverged, match="diverged 4 times"):
        train(WARM, load("digits"), tmp_path, init=None, clock=Clock(), device=CPU)
    assert signal.getsignal(signal.SIGINT) is usual
