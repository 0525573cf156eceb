"""Tests of the training loop: stopped, killed and resumed, out of time, diverged, on other data, and command-line overrides."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.card import Baseline
from ebjdat_serve.manifest import Licence
from ebjdat_serve.networks.wideresnet import WideResNet
from ebjdat_serve.rows import first
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.sgld import Prior
from tests.conftest import ROOT
from training import overrides
from training.card import card
from training.config import describe, stages
from training.data.datasets import load
from training.distributed import Noise, Ranks
from training.errors import OutOfTime, TrainingDiverged, TrainingError
from training.evaluation import context
from training.evaluation.context import Suite
from training.loop.bundle_writer import Origin, draft_bundle, licence_of
from training.loop.clock import Clock
from training.loop.divergence import diverged
from training.loop.loop import learning_rate, total_steps, train
from training.loop.start import new_state
from training.loop.state import check_weights, load_position, load_weights, save_weights
from training.loop.stream import Stream
from training.methods import StepContext, replay
from training.methods.adversary import Attack, Threat, cross_entropy
from training.methods.at import AdversarialTraining
from training.methods.dat import Dat
from training.methods.ebjdat import EbJdat
from training.methods.replay import ChainConfig
from training.overrides import listing, override
from training.presets import DIGITS, PRESETS, preset
from training.refresh import refresh, train_stages
from training.train import main

CPU = torch.device("cpu")
WARM = stages(DIGITS)[0]
FEW = replace(DIGITS.method, chains=replace(DIGITS.method.chains, batch=8, buffer_size=96))


@pytest.mark.parametrize(("precision", "left"), [("fp32", False), ("bf16", True)])
def test_training_in_fp32_is_not_in_tf32(precision, left):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        new_state(replace(WARM, precision=precision), load("digits"), None, CPU)
        assert torch.backends.cudnn.allow_tf32 is left


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    assert learning_rate(0.0, 0.4, "linear") == 0
    assert learning_rate(0.4, 0.4, "linear") == pytest.approx(1.0)
    assert learning_rate(0.2, 0.4, "linear") == pytest.approx(0.5)
    assert learning_rate(1.0, 0.4, "linear") == pytest.approx(0.0)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path, monkeypatch):
    data = load("digits")
    preset = replace(DIGITS, epochs=2.5, method=FEW)
    whole = train(preset, data, tmp_path / "whole", init=None, clock=Clock(), device=CPU)

    class Interrupting(Clock):
        calls = 0

        def over(self):
            self.calls += 1
            if self.calls > 23:
                os.kill(os.getpid(), signal.SIGINT)
            return super().over()

    with pytest.raises(KeyboardInterrupt):
        train(preset, data, tmp_path / "parts", init=None, clock=Interrupting(), device=CPU)
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    parts = train(preset, data, tmp_path / "parts", init=None, clock=Clock(), device=CPU)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert parts.read_bytes() == whole.read_bytes()


def test_a_run_out_of_time_ends_cleanly_with_weights(tmp_path):
    weights = train(replace(WARM, epochs=50), load("digits"), tmp_path, init=None, clock=Clock(0.02), device=CPU)
    assert weights.is_file()


def test_divergence_is_rolled_back_counted_and_in_the_end_an_error(tmp_path):
    data = load("digits")
    wild = replace(DIGITS, epochs=30, energy_gap_limit=1e-9, method=FEW)
    state = new_state(wild, data, None, CPU)
    state.save(tmp_path / "state.pt")
    with pytest.raises(TrainingDiverged, match="diverged 4 times"):
        train(wild, data, tmp_path, init=None, clock=Clock(), device=CPU)
    assert sum("diverged" in line for line in (tmp_path / "log.jsonl").read_text().splitlines()) == 4


def test_what_counts_as_diverged():
    assert diverged({"loss": float("nan")}, DIGITS, 0.5)
    assert diverged({"energy_gap_neg": -51.0}, DIGITS, 0.5)
    assert diverged({"saturation": 0.6}, DIGITS, 0.0)
    assert not diverged({"saturation": 0.9}, DIGITS, 0.5)  # half of the pixels of digits are black
    assert not diverged({"loss": 2.0, "energy_gap_neg": 3.0, "saturation": 0.1}, DIGITS, 0.0)


def test_overrides_reach_parts_and_are_checked():
    changed = override(DIGITS, ["lr=0.5", "attack.steps=3", "frozen_norm=false", "method.w2=1", "threat.norm=l2", "eps=1.5"])
    assert (changed.lr, changed.method.attack.steps, changed.frozen_norm, changed.method.w2) == (0.5, 3, False, 1.0)
    assert changed.threat == Threat("l2", 1.5)
    assert override(DIGITS, ["epochs=0.5", "buffer_size=80"]).method.chains.buffer_size == 80
    for setting, said in (
        ("learning=1", "fields are"),
        ("steps=3", "steps is one of method.attack.steps, method.chains.steps, sample.steps"),
        ("attack.steps=many", "steps is a int"),
        ("frozen_norm=yes", "frozen_norm is a bool"),
        ("norm=l1", "norm must be linf or l2"),
    ):
        with pytest.raises(TrainingError, match=said):
            override(DIGITS, [setting])


def test_a_method_on_unknown_budget_is_an_error_that_lists_both():
    with pytest.raises(TrainingError, match=r"methods are standard.*budgets digits"):
        preset("trade", "digits")


def test_a_preset_describes_itself_as_json():
    said = json.loads(json.dumps(describe(preset("awp-trades", "digits"))))
    assert said["method"] == {"kind": "Trades", "beta": 6.0, "attack": {"steps": 10, "step_over_eps": 0.25, "start": "gaussian"}}
    assert said["sharpness"]["kind"] == "Awp"
    assert json.loads(json.dumps(describe(DIGITS)))["warm_start"] == "digits-fgsm"


def test_the_listing_names_every_method_and_what_it_reached():
    said = listing()
    assert "ebjdat-paper-jem++" in said
    rows = Bundle.draft(SHIPPED).metrics()
    clean, robust = (first(rows, name, n=10_000).value for name in ("accuracy_clean", "accuracy_pgd20"))
    assert re.search(rf"^  cifar10-small +clean {clean:.3f}, PGD-20 8/255 {robust:.3f} \(the bundled model\)", said, re.M)


def test_the_warm_start_is_of_the_same_network_and_ball():
    warm, joint = stages(override(DIGITS, ["width=2", "eps=0.1"]))
    assert (warm.architecture.width, warm.threat.eps) == (2, 0.1)
    assert joint.architecture.width == 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("name=cifar10-small-fgsm", "different names"),  # of the warm start's warm start
        ("averaged_with.name=cifar10-small-pgd7", "different names"),
        ("averaged_with.warm_start.epochs=1", "averaged_with starts|fields are"),  # which would have no effect
        ("averaged_with.lr=-1", "lr must be"),
        ("averaged_with.name=../elsewhere", "its folder is named so"),
        ("name=", "its folder is named so"),
        ("save_seconds=nan", "save_seconds must be a finite number"),
        ("averaged_with.seed=3", "all stages have one seed, the last one's: set seed=3"),
        ("warm_start.warm_start.architecture.depth=16", "one architecture, the last one's: set architecture.depth=16"),
    ],
)
def test_a_recipe_whose_stages_cannot_be_told_apart_or_have_no_effect_is_refused(setting, said):
    with pytest.raises(TrainingError, match=said):
        override(PRESETS["cifar10-small"], [setting])
    with pytest.raises(ValueError, match="averaged_with starts where this stage does"):
        replace(DIGITS, averaged_with=replace(DIGITS, name="other"))  # which has a warm start of its own


def test_dat_without_bce_is_adversarial_training_step_for_step(tmp_path):
    data, attack = load("digits"), Attack(steps=2, start="image")
    stage = replace(WARM, epochs=0.5, plain_batch=64)
    ends = {}
    for name, method in (
        ("at", AdversarialTraining(attack)),
        ("dat", replace(preset("dat", "digits").method, attack=attack, bce_weight=0.0)),
    ):
        ends[name] = train(replace(stage, method=method), data, tmp_path / name, init=None, clock=Clock(), device=CPU).read_bytes()
    assert ends["at"] == ends["dat"]


@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
def test_without_h1_and_h2_ebjdat_is_adversarial_training_plus_clean_cross_entropy(clean_weight):
    data, attack = load("digits"), Attack(steps=3)
    at = replace(DIGITS, method=AdversarialTraining(attack))
    jdat = replace(
        DIGITS,
        method=EbJdat(w1=0, w2=0, energy_penalty=0, clean_weight=clean_weight, attack=attack, chains=ChainConfig(batch=8, buffer_size=80)),
    )
    losses = []
    for stage in (at, jdat):
        state = new_state(stage, data, None, CPU)
        state.model.eval()
        batch = Stream(stage, data, CPU, Noise.seeded(1)).batch(0)
        now = StepContext(stage.threat, Noise.seeded(2), 0.5)
        found = stage.method.solve(state.model, batch, state.method_state, now)
        losses.append(stage.method.loss(state.model, found, state.method_state, now).loss)
        clean = cross_entropy(state.model(batch.image), batch.label).mean()
    torch.testing.assert_close((1 - clean_weight) * losses[0] + clean_weight * clean, losses[1])


def test_the_prior_is_fitted_once_for_chains_validation_and_the_bundle(tmp_path, monkeypatch):
    real, fitted, data = replay.fit_prior, [], load("digits")
    monkeypatch.setattr(replay, "fit_prior", lambda *given: fitted.append(real(*given)) or fitted[-1])
    stage = replace(DIGITS, epochs=0.1, method=FEW)
    weights = train(stage, data, tmp_path / "run", init=None, clock=Clock(), device=CPU)
    bundle = draft_bundle(
        weights, stage, data, tmp_path / "bundle", Origin("git", "now", ""), load_position(weights.with_name("state.pt")), 1
    )
    assert len(fitted) == 1
    again = real(data.train, 10, stage.prior_rank)
    assert torch.equal(torch.from_numpy(fitted[0].factor), torch.from_numpy(again.factor))
    assert (Prior.load(bundle.path / "prior.safetensors").mean == again.mean).all()
    assert bundle.manifest.licence == Licence("Apache-2.0", "Apache-2.0", "CC-BY-4.0")
    begun = Origin("git", "now", "")
    assert licence_of(replace(stage, extra="more.npz"), data, begun) == Licence()
    assert licence_of(replace(stage, method=Dat(seeds="folder")), data, begun) == Licence()
    assert licence_of(stage, data, replace(begun, init_sha256="a" * 64)) == Licence()
    assert licence_of(stage, replace(data, name="mine"), begun) == Licence()


@pytest.mark.parametrize("damage", ["gone", "cut", "no manifest", "no accuracy"])
def test_the_help_needs_no_bundled_model(tmp_path, monkeypatch, damage):
    copy = tmp_path / "cifar10"
    copy.mkdir()
    for name in ("bundle.json", "metrics.json"):
        (copy / name).write_bytes((SHIPPED / name).read_bytes())
    monkeypatch.setattr(overrides, "SHIPPED", copy)
    assert "(the bundled model)" in listing()
    if damage == "cut":
        (copy / "metrics.json").write_bytes((SHIPPED / "metrics.json").read_bytes()[:100])
    elif damage == "no accuracy":
        (copy / "metrics.json").write_text("[]")
    else:
        (copy / ("bundle.json" if damage == "no manifest" else "metrics.json")).unlink()
    said = listing()
    assert "cifar10-small" in said and "(the bundled model)" not in said


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', '{"standard": 3}', '{"standard": {"summary": 3}}', "[" * 200_000, "{", "ÿ"])
def test_the_help_needs_no_measured_methods(tmp_path, monkeypatch, text):
    (tmp_path / "methods.json").write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(overrides, "MEASURED", tmp_path / "methods.json")
    assert re.search(r"^  standard +not measured$", listing(), re.M)


@pytest.mark.slow
def test_a_killed_run_resumes_with_bit_identical_losses(tmp_path):
    """kill -9 in the middle, then --resume through the command line, against a run that nobody disturbed."""
    command = [sys.executable, str(ROOT / "training" / "train.py"), "digits", "--only-train", "--threads", "1"]
    command += ["--set", "warm_start.epochs=1", "epochs=4", "chains.steps=1", "attack.steps=1", "save_seconds=0.3"]
    environment = {**os.environ, "EBJDAT_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--run", "whole"], env=environment, check=True, capture_output=True)
    process = subprocess.Popen([*command, "--run", "killed"], env=environment, stdout=subprocess.DEVNULL)
    log = tmp_path / "killed" / "digits" / "log.jsonl"
    end = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "digits" / "weights.safetensors").exists()
    assert load_position(tmp_path / "killed" / "digits" / "state.pt").step > 0
    subprocess.run([*command, "--run", "killed", "--resume"], env=environment, check=True, capture_output=True)
    assert losses(tmp_path / "killed" / "digits") == losses(tmp_path / "whole" / "digits")
    ends = [(tmp_path / run / "digits" / "weights.safetensors").read_bytes() for run in ("killed", "whole")]
    assert ends[0] == ends[1]


def test_weights_of_another_network_cannot_start_a_run(tmp_path):
    save_weights(WideResNet(10, 2, 10).state_dict(), tmp_path / "wide.safetensors")
    save_weights({"strange": torch.zeros(3)}, tmp_path / "strange.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    for name in ("wide", "strange", "broken", "absent"):
        with pytest.raises(TrainingError, match=name):
            new_state(WARM, load("digits"), tmp_path / f"{name}.safetensors", CPU)


def test_a_run_without_time_for_a_step_is_an_error_not_a_model(tmp_path):
    with pytest.raises(OutOfTime, match="time ran out"):
        train(WARM, load("digits"), tmp_path, init=None, clock=Clock(0), device=CPU)
    assert not (tmp_path / "weights.safetensors").exists()


def test_a_stage_that_a_later_one_continued_gets_its_weights_again_from_its_state(tmp_path):
    data, stage = load("digits"), replace(WARM, epochs=0.06)
    weights = train(stage, data, tmp_path / "run", init=None, clock=Clock(), device=CPU)
    before = load_weights(weights)
    weights.unlink()
    check_weights(tmp_path / "run")
    for name, value in load_weights(weights).items():
        assert torch.equal(value, before[name])
    weights.write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"weights\.safetensors is damaged .*: delete it, and the run writes it again"):
        check_weights(tmp_path / "run")
    with pytest.raises(TrainingError, match=r"weights\.safetensors is missing"):
        check_weights(tmp_path)


def test_a_full_disk_names_the_file_and_a_state_of_something_else_is_damaged(tmp_path):
    torch.save({"a": 1}, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match=r"state\.pt is damaged"):
        load_position(tmp_path / "state.pt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = new_state(WARM, load("digits"), None, CPU)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        for name, write in (("full.pt", state.save), ("full.safetensors", lambda path: save_weights(state.ema, path))):
            with pytest.raises(TrainingError, match=f"{name} cannot be written .*: is the disk full"):
                write(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {file.name for file in tmp_path.iterdir()} == {"state.pt"}


def test_a_stage_without_steps_is_told_before_the_stages_before_it_are_trained(tmp_path):
    stage = replace(DIGITS, epochs=0)
    with pytest.raises(TrainingError, match="digits has nothing to train: its epochs are 0"):
        refresh(stage, tmp_path, init=None, clock=Clock(), suite=None, device=CPU)
    assert not (tmp_path / "digits-fgsm").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"stages": []}', '{"stages": [{"name": "digits"}]}'])
def test_a_configuration_that_is_none_is_told(tmp_path, monkeypatch, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--run", "run", "--resume", "--threads", "1"])
    with pytest.raises(SystemExit, match=r"config\.json is damaged"):
        main()


def test_an_interrupted_run_that_only_trains_goes_on_so_and_options_are_not_shortened(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--run", "run", "--only-train", "--max-minutes", "0", "--threads", "1"])
    with pytest.raises(SystemExit, match=r"go on with: .* --run run .*--resume --only-train$"):
        main()
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--max-min", "1"])  # which gpu_train.sh would not know as its own
    with pytest.raises(SystemExit):
        main()
    assert "unrecognized arguments: --max-min" in capsys.readouterr().err


@pytest.mark.slow
def test_training_and_the_torch_engine_need_no_more_than_torch_numpy_pillow_and_safetensors():
    absent = ("onnx", "onnxruntime", "onnxscript", "scipy", "sklearn", "litserve", "fastapi", "pydantic", "pyautoattack", "tqdm")
    absent += ("jinja2", "matplotlib")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import training.train, training.refresh, ebjdat_serve.engines.eager"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_time_is_shared_by_the_passes_of_what_is_left(tmp_path, monkeypatch):
    shares = []

    class Recorded(Clock):
        def allot(self, share):
            shares.append(share)

    def trained(stage, data, folder, **how):
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").touch()

    monkeypatch.setattr("training.refresh.train", trained)
    monkeypatch.setattr("training.refresh.write_report", lambda folder, stage: None)
    data, todo = load("digits"), stages(DIGITS)
    how = {"init": None, "device": CPU, "ranks": Ranks(), "tensorboard": False}
    train_stages(todo, data, tmp_path, clock=Recorded(), **how)
    steps = [total_steps(stage, len(data.train)) for stage in todo]
    fgsm, joint = steps[0] * 2 * 64, steps[1] * (6 * 64 + 6 * 32)  # attack and update; chains and theirs
    assert shares[0] == pytest.approx(fgsm / (fgsm + joint), rel=1e-3)
    assert shares[1] == pytest.approx(1)


@pytest.mark.slow
def test_a_short_time_is_shared_by_the_stages_and_ends_with_a_bundle(tmp_path, monkeypatch):
    """Through the command, but in this process, where little of the evaluation that follows is enough."""
    monkeypatch.setitem(context.SUITES, "quick", Suite(*[20, 5, 5, 0, 0, 0, 2, 5, 1, 5, 10], queries=5, thorough=False))
    monkeypatch.setattr("training.evaluate.USUAL", ("clean", "robustness", "landscape"))
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--threads", "1", "--run", "short", "--max-minutes", "0.4"])
    main()
    bundle = Bundle.load(tmp_path / "short" / "store" / "current")
    assert bundle.manifest.name == "digits"
    assert 0 < bundle.manifest.provenance.steps < bundle.manifest.provenance.planned_steps
    assert 0 < load_position(tmp_path / "short" / "digits-fgsm" / "state.pt").step < 340


@pytest.mark.slow
def test_a_recipe_of_two_averaged_runs_publishes_their_mean_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(context.SUITES, "quick", Suite(*[20, 5, 5, 0, 0, 0, 2, 5, 1, 5, 10], queries=5, thorough=False))
    monkeypatch.setattr("training.evaluate.USUAL", ("clean", "robustness", "landscape"))
    short = {"epochs": 0.5, "method": FEW}
    start = replace(WARM, name="start", epochs=3, warm_start=replace(WARM, epochs=3))
    stage = replace(DIGITS, warm_start=start, averaged_with=replace(DIGITS, name="other", warm_start=None, lr=0.01, **short), **short)
    run, how = tmp_path / "run", {"init": None, "suite": "quick", "device": CPU}
    home = refresh(stage, run, clock=Clock(), **how)
    bundle = Bundle.load(home)
    own, its = (load_weights(run / name / "weights.safetensors") for name in ("digits", "other"))
    for name, value in load_weights(home / "weights.safetensors").items():
        torch.testing.assert_close(value, (own[name] + its[name]) / 2, rtol=1e-6, atol=1e-7)
    said = bundle.manifest.provenance
    assert (said.steps, said.planned_steps) == (18, 18)  # nine of each
    assert said.configuration["averaged_with"]["lr"] == 0.01
    assert (said.configuration["lr"], said.configuration["warm_start"]) == (stage.lr, "start")
    text = (home / "README.md").read_text(encoding="utf-8")
    assert "the mean of two runs from one start, this one and `other`" in text
    assert "The column `warm start` is of `start`" in text
    assert {folder.parent.name for folder in run.glob("*/bundle")} == {"start", "digits"}  # what the card compares
    assert refresh(stage, run, clock=Clock(), **how) == home  # nothing is left to do


@pytest.mark.slow
def test_what_diverged_is_counted_in_the_model_card(tmp_path, monkeypatch):
    """One poisoned step, and the rest of the run as if nothing had been."""
    loop = sys.modules["training.loop.loop"]

    real, said = loop.scalars, []

    def poisoned(*given):
        row, flags = real(*given)
        said.append(row)
        return ({**row, "loss": float("nan")} if len(said) == 25 else row), flags

    monkeypatch.setattr(loop, "scalars", poisoned)
    stage = replace(WARM, epochs=2)
    data = load("digits")
    weights = train(stage, data, tmp_path / "run", init=None, clock=Clock(), device=CPU)
    position = load_position(tmp_path / "run" / "state.pt")
    assert (position.step, position.rollbacks) == (34, 1)
    assert sum('"diverged": 1' in line for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
    bundle = draft_bundle(weights, stage, data, tmp_path / "bundle", Origin("git", "now", ""), position, 34)
    assert "rolled back for divergence 1 times" in card(bundle, [], Baseline())
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["position"][3] == 0.5  # half the rate
