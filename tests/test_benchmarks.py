"""Tests of the benchmarks' own logic: output files, and missing engines or time."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import benchmarks.engines as engines
from benchmarks import (
    averaged_runs,
    digits_cells,
    equal_budget,
    equal_budget_entries,
    equal_budget_rows,
    equal_budget_table,
    explanations,
    gpu_hours,
    gpu_parallel,
    load,
    priors,
    tables,
)
from benchmarks.public_nets import KNOWN
from ebjdat_serve.bundle import Bundle, read_rows, write_rows
from ebjdat_serve.errors import BundleError, EngineError
from ebjdat_serve.rows import PRIOR, Images, first, parse_rows, rows_where
from ebjdat_serve.server.settings import SHIPPED
from tests.conftest import ROOT
from training.config import describe, stages
from training.evaluation.metrics import auroc, auroc_stderr, mean_interval
from training.evaluation.rows import estimate, number, proportion
from training.loop.state import mean_weights
from training.overrides import override
from training.presets import CIFAR10_SMALL, PRESETS, preset


def test_the_documents_tables_are_those_of_the_json(shipped):
    rows = json.loads((ROOT / "benchmarks" / "engines.json").read_text())
    text = (ROOT / "docs" / "engines.md").read_text()
    assert engines.document(text, rows, shipped) == text


def test_the_hours_of_a_gpu_are_those_that_are_computed():
    text = gpu_hours.PAGE.read_text()
    assert gpu_hours.document(text) == text, "python benchmarks/gpu_hours.py --document"
    for stage, row in zip(stages(CIFAR10_SMALL), ("warm-fgsm", "warm", "trades-w1", "ebjdat-light"), strict=True):
        made = gpu_hours.passes(stage)
        assert made.inner + made.update == equal_budget.ENTRIES[row].passes
    to_image, to_weights = (gpu_hours.flops_of_pass(CIFAR10_SMALL.architecture, update=update) for update in (False, True))
    assert to_weights / to_image == pytest.approx(1.5, rel=0.01)  # the gradient to the weights costs as much as the one to the image


def test_the_tables_of_serving_are_those_of_the_json():
    text = (ROOT / "docs" / "serving.md").read_text()
    assert tables.serving(text) == text


def test_the_tables_of_drift_are_those_of_the_json():
    text = (ROOT / "docs" / "drift.md").read_text(encoding="utf-8")
    assert tables.drift(text) == text


def test_the_tables_of_the_evaluation_are_those_of_the_json():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert tables.evaluation(text) == text, "run python benchmarks/tables.py"


def test_the_table_of_explanations_is_that_of_the_json():
    rows = json.loads((ROOT / "benchmarks" / "explanations.json").read_text())
    text = (ROOT / "docs" / "explanations.md").read_text()
    assert explanations.document(text, rows) == text
    strip = ROOT / "docs" / "explanations.png"
    assert b"trainedAlgorithmicMedia" in strip.read_bytes()
    assert strip.stat().st_size < 150_000


def test_the_table_of_priors_is_that_of_the_json():
    rows = json.loads((ROOT / "benchmarks" / "priors.json").read_text())
    text = (ROOT / "docs" / "import.md").read_text()
    assert priors.document(text, rows) == text
    assert {row["model"] for row in rows} == set(priors.SUBJECTS)
    assert b"trainedAlgorithmicMedia" in (ROOT / "docs" / "priors.png").read_bytes()


def test_our_attacks_land_on_the_known_figures_of_the_public_nets():
    rows = {row["name"]: row["value"] for row in json.loads((ROOT / "benchmarks" / "public_nets.json").read_text())}
    for name, (clean, apgd) in KNOWN.items():
        assert rows[f"accuracy_clean {name}"] == clean
        assert rows[f"accuracy_apgd {name}"] <= apgd
        assert rows[f"accuracy_autoattack {name}"] == rows[f"accuracy_autoattack_torchattacks {name}"]


def test_other_libraries_say_the_same():
    rows = json.loads((ROOT / "benchmarks" / "crosscheck.json").read_text())
    assert {row["library"].split(",")[0] for row in rows} == {"scikit-learn", "pytorch-ood", "torchmetrics", "counted by hand"}
    for row in rows:
        assert row["ours"] == pytest.approx(row["value"], abs=2e-5), row["name"]


def test_the_walk_tells_fooled_images_from_clean_ones_as_well_as_it_must_and_better_than_max_softmax():
    rows = [tables.parsed(row) for row in json.loads((ROOT / "benchmarks" / "reach.json").read_text())]
    assert len({row.key for row in rows}) == len(rows)
    for eps, bar in ((8 / 255, 0.77), (4 / 255, 0.83)):
        found = {row.score: row.value for row in rows_where(rows, "reach_auroc", attack="pgd", eps=eps)}
        assert found["reach_score"] >= max(bar, found["max_softmax"], found["margin"])
    for row in rows_where(rows, "review_share", attack=None):
        low, high = row.expected
        assert low <= row.value <= high


def test_what_rejection_gives_against_an_attack_that_knows_it_is_no_more_than_the_radius_of_its_search():
    """Far more would show a weak attack, not a strong defence."""
    rows = [tables.parsed(row) for row in json.loads((ROOT / "benchmarks" / "reach.json").read_text())]
    for row in rows_where(rows, "accuracy_with_search"):
        less = first(rows, "accuracy_less_radius", radius=row.radius)
        assert row.n == less.n >= 200
        assert row.value <= less.interval[1]


def test_each_process_has_a_core_of_its_own():
    """A child inherits its parent's one core: it must be put on another all the same."""
    if len(load.CORES) < 2:
        pytest.skip("one core")
    code = "import os, sys; print(sorted(os.sched_getaffinity(0)))"
    before = os.sched_getaffinity(0)
    try:
        load.pin(1)
        done = subprocess.run([sys.executable, "-c", code], preexec_fn=lambda: load.pin(0), capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [load.CORES[0]]
        assert os.sched_getaffinity(0) == {load.CORES[1]}
    finally:
        os.sched_setaffinity(0, before)


def test_a_road_that_cannot_step_is_listed_with_its_reason(shipped, monkeypatch):
    from ebjdat_serve.engines.ort import OnnxEngine

    def broken(self, chains, steps):
        raise EngineError("no step here")

    monkeypatch.setattr(OnnxEngine, "advance", broken)
    found, missing = engines.roads(shipped, [("onnx", "cpu", "fp32"), ("torch", "cpu", "fp32"), ("onnx", "cpu", "bf16")])
    assert list(found) == ["torch cpu fp32"]
    assert [(row["name"], row["unit"]) for row in missing] == [("onnx cpu fp32", "unmeasured"), ("onnx cpu bf16", "unmeasured")]
    assert missing[0]["why"] == "no step here"


def test_one_cpu_thread_is_timed_by_the_cpus_time():
    assert torch.get_num_threads() == 1
    assert engines.clock(torch.device("cpu")) is time.process_time
    assert engines.clock(torch.device("cuda")) is time.perf_counter


def test_every_entry_at_equal_budget_is_a_run_that_the_trainer_takes():
    models = ROOT / "benchmarks" / "models"
    ran_once = {folder.name.removeprefix(equal_budget.PREFIX) for folder in models.glob("wrn28-*")} - set(equal_budget.AVERAGES)
    assert len(ran_once) == 10
    assert ran_once <= set(equal_budget.ENTRIES)
    for name, entry in equal_budget.ENTRIES.items():
        stage = PRESETS[entry.method] if entry.method in PRESETS else preset(entry.method, "small", "cifar10")
        taken = override(stage, ["depth=28", "width=2", "epochs=1.5", *entry.settings])  # raises for a field that is none
        assert taken.ema == 0.999, name
        assert entry.init in ("", *equal_budget.ENTRIES)
        if name in ran_once:  # the entry is what was run
            ran = json.loads((models / f"{equal_budget.PREFIX}{name}" / "config.json").read_text())["stages"][-1]
            epochs = entry.epochs or equal_budget.BUDGET / entry.passes
            now = describe(override(stage, ["depth=28", "width=2", f"epochs={epochs:.2f}", *entry.settings]))
            assert {**now, "name": ran["name"]} == ran, name  # cifar10-wrn16 was called cifar10-small


def kept_run(models, name, rows, masks=()):
    folder = models / f"{equal_budget.PREFIX}{name}"
    folder.mkdir()
    write_rows(folder / "metrics.json", rows)
    if masks:
        np.savez(folder / "images.npz", **{row.key: np.array(good, bool) for row, good in zip(rows, masks, strict=True)})


def cells_of(text):
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
    return {line[0].split("`")[1]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


PGD20 = Images(
    dataset="cifar10", split="test", attack="pgd", norm="linf", eps=8 / 255, objective="ce", steps=20, step_over_eps=0.25, restarts=1
)


def test_a_proportion_at_equal_budget_stands_above_its_paired_difference_and_no_other(tmp_path):
    def keep(name, good):
        kept_run(tmp_path, name, [proportion("accuracy_pgd20", sum(good), len(good), PGD20, "")], [good])

    control = [1] * 60 + [0] * 40
    keep("pgd7", control)
    keep("trades", [1] * 70 + [0] * 30)
    keep("dat", [1] * 20 + [0] * 20)  # of the first 40 images alone
    kept = equal_budget_table.kept_rows(tmp_path)
    found = {name: row["PGD-20 8/255"] for name, row in cells_of(equal_budget_table.table(kept, equal_budget_table.ACCURACY)).items()}
    half = 1.96 * (0.1 * 0.9) ** 0.5 / 10
    assert found["trades"] == f"0.7 (n = 100)<br>+0.1000 [{0.1 - half:+.4f}, {0.1 + half:+.4f}] (n = 100)"
    half = 1.96 * 0.5 / 40**0.5
    assert found["dat"] == f"0.5 (n = 40)<br>-0.5000 [{-0.5 - half:+.4f}, {-0.5 + half:+.4f}] (n = 40)"
    assert found["pgd7"] == "0.6 (n = 100)"


def test_fewer_of_a_subset_are_not_the_first_of_more(tmp_path):
    """Of the images that an attack fooled, say, which are others for each network."""
    for name, n in (("pgd7", 40), ("trades", 30)):
        row = proportion("flag_power", n, n, replace(PGD20, subset="fooled"), "")
        kept_run(tmp_path, name, [row], [[1] * n])
    files = [tmp_path / f"{equal_budget.PREFIX}{name}" / "images.npz" for name in ("trades", "pgd7")]
    assert equal_budget_table.paired(*files, row.key) == (0, "")


def test_figures_that_are_no_proportions_differ_by_independent_errors(tmp_path):
    about = {"extractor": "resnet20", "stderr": 0.03}
    for name, value in (("pgd7", 0.9), ("trades", 0.4)):
        sampled = Images(**equal_budget_table.SAMPLED)
        other = replace(sampled, steps=20)  # of another sampler: not comparable
        rows = [number("kernel_distance_resnet20", value, 500, sampled, "", **about)]
        kept_run(tmp_path, name, [*rows, number("kernel_distance_resnet20", 0.01, 900, other, "", **about)])
    found = cells_of(equal_budget_table.table(equal_budget_table.kept_rows(tmp_path), equal_budget_table.SAMPLES))
    half = 1.96 * 0.03 * 2**0.5
    assert found["trades"]["KID, ResNet-20"] == f"0.4 ± 0.059 (n = 500)<br>-0.5000 [{-0.5 - half:+.4f}, {-0.5 + half:+.4f}]"


def agreement_of(worse, n, value=0.7):
    """Return the end of a line whose agreement is of ``worse`` fewer samples than the control's."""
    share = worse / n
    half = 1.96 * (share * (1 - share) / n) ** 0.5
    return f"| {value} (n = {n})<br>{-share:+.4f} [{-share - half:+.4f}, {-share + half:+.4f}] (n = {n}) |"


def test_samples_differ_from_the_control_of_their_own_starts(tmp_path):
    """Chains of another machine start elsewhere: the signs of the prior's principal components are free."""
    about = {"extractor": "resnet20", "stderr": 0.03}
    sampled = Images(**equal_budget_table.SAMPLED)
    folders = {"pgd7": (0.8, 2.2, 9), "trades": (0.4, 2.2, 8), "dat": (0.3, 2.3, 7), "pgd7/other-starts": (0.9, 2.3, 10)}
    for name, (value, prior, good) in folders.items():
        agreement = proportion("class_agreement_resnet20", good, 10, sampled, "", extractor="resnet20")
        rows = [
            number("kernel_distance_resnet20", value, 500, sampled, "", **about),
            number("kernel_distance_resnet20", prior, 500, Images(dataset=PRIOR), "", **about),
        ]
        kept_run(tmp_path, name, [agreement], [[1] * good + [0] * (10 - good)])
        write_rows(tmp_path / f"{equal_budget.PREFIX}{name}" / "metrics.json", [agreement, *rows])
    kept, other = equal_budget_table.kept_rows(tmp_path), equal_budget_table.other_starts(tmp_path)
    lines = equal_budget_table.samples_table(kept, other).splitlines()[2:]
    cells = {name: cell for name, cell, *_ in (line.removeprefix("| ").split(" | ") for line in lines)}
    assert cells["`trades`"].startswith("0.4 ± 0.059 (n = 500)<br>-0.4000 [")
    assert cells["`dat` *"].startswith("0.3 ± 0.059 (n = 500)<br>-0.6000 [")
    assert cells["**`pgd7`**, the control"] == "0.8 ± 0.059 (n = 500)"
    assert cells["`pgd7` from the starts of *"] == "0.9 ± 0.059 (n = 500)"
    assert next(line for line in lines if line.startswith("| `dat` *")).endswith(agreement_of(3, 10))
    assert next(line for line in lines if line.startswith("| `trades`")).endswith(agreement_of(1, 10, 0.8))
    (tmp_path / "wrn28-pgd7" / "other-starts" / "metrics.json").unlink()
    assert equal_budget_table.other_starts(tmp_path) is None


def test_nll_and_auroc_differ_by_paired_errors_where_values_are_kept(tmp_path):
    noise = np.random.default_rng(0)
    shared, added = noise.normal(size=(2, 300)), noise.normal(size=(2, 2, 300)) / 10
    values = [{"nll": shared[0] + a[0], "energy|clean": shared[0] + a[0], "energy|svhn_train_first1080": shared[1] + a[1]} for a in added]
    for name, kept in zip(("pgd7", "trades"), values, strict=True):
        nll, clean, strange = kept.values()
        rows = [
            estimate("nll", nll.mean(), mean_interval(nll), 300, Images(dataset="cifar10", split="test"), "", temperature="fitted"),
            number(
                "auroc_energy",
                auroc(clean, strange),
                600,
                Images(dataset="svhn_train_first1080"),
                "",
                score="energy",
                stderr=auroc_stderr(clean, strange),
            ),
        ]
        kept_run(tmp_path, name, rows)
        np.savez(tmp_path / f"{equal_budget.PREFIX}{name}" / "values.npz", **kept)

    def differences():
        kept = equal_budget_table.kept_rows(tmp_path)
        found = cells_of(equal_budget_table.table(kept, [*equal_budget_table.ACCURACY, *equal_budget_table.DETECTION]))["trades"]
        return [[float(part) for part in re.findall(r"[+-]\d\.\d+", found[name].split("<br>")[1])] for name in ("NLL", "SVHN, energy")]

    (change, low, high), (apart, lower, upper) = differences()
    each = values[1]["nll"] - values[0]["nll"]
    assert (change, (high - low) / 2) == pytest.approx((each.mean(), 1.96 * each.std() / 300**0.5), abs=1e-4)
    areas = [(one["energy|clean"], one["energy|svhn_train_first1080"]) for one in values]
    assert apart == pytest.approx(auroc(*areas[1]) - auroc(*areas[0]), abs=1e-4)
    file = tmp_path / f"{equal_budget.PREFIX}trades" / "values.npz"
    for wrong in (
        values[0],
        {key: value[:100] for key, value in values[1].items()},
        {key: value * np.nan for key, value in values[1].items()},
    ):
        np.savez(file, **wrong)
        with pytest.raises(BundleError, match=r"values\.npz is not of trades's nll"):
            differences()
    for odd in ({"nll": np.float64(1)}, {"nll": np.zeros((2, 2))}, {"nll": np.array(["a"])}, {"nll": np.array([None])}):
        np.savez(file, **odd)
        with pytest.raises(BundleError, match=r"values\.npz is damaged"):
            differences()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"values\.npz is damaged"):
        differences()
    file.unlink()
    (_, *alone), (_, *independent) = differences()
    assert alone[1] - alone[0] > 3 * (high - low)
    assert independent[1] - independent[0] > 3 * (upper - lower)


def test_kept_values_are_those_of_the_kept_rows():
    found = 0
    for one in equal_budget_table.kept_rows(ROOT / "benchmarks" / "models").values():
        if one.values.is_file():
            with np.load(one.values) as values:
                (nll,) = rows_where(one.rows, "nll", temperature="fitted")
                assert values["nll"].mean(dtype=np.float64) == pytest.approx(nll.value, abs=1e-6)
                for column in equal_budget_table.DETECTION[:6]:
                    (row,) = rows_where(one.rows, column.metric, **column.fields)
                    score = row.score
                    assert auroc(values[f"{score}|clean"], values[f"{score}|{row.dataset}"]) == pytest.approx(row.value, abs=1e-9)
                found += 1
    assert found == 5


def test_an_average_costs_what_its_runs_cost():
    models = ROOT / "benchmarks" / "models"
    kept = dict.fromkeys(("trades-w1", "ebjdat-light", "ebjdat-mean"))
    (first_run, second, mean) = (line.split(" | ") for line in equal_budget_table.cost_table(models, kept).splitlines()[2:])
    for column in (1, 2, 3):
        parts = [float(run[column].strip(" |")) for run in (first_run, second)]
        assert float(mean[column].strip(" |")) == pytest.approx(sum(parts), abs=0.11 if column == 2 else 0.02)
    assert float(first_run[3].strip(" |")) == pytest.approx(1573 * 128 * 12.5 / 1e6, abs=0.005)


def test_the_document_of_equal_budget_is_that_of_the_kept_rows():
    models = ROOT / "benchmarks" / "models"
    text = (ROOT / "docs" / "equal_budget.md").read_text(encoding="utf-8")
    assert equal_budget_table.document(text, models) == text, "run python benchmarks/equal_budget.py benchmarks/models --document"
    with Image.open(ROOT / "docs" / "pareto.png") as picture:  # which says what it shows
        assert json.loads(picture.text["points"]) == equal_budget_table.points(
            equal_budget_table.kept_rows(models), equal_budget_table.other_starts(models)
        )


def test_the_weights_of_an_average_are_the_fp32_mean(tmp_path):
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file, value in zip(files, (1.0, 1.0 + 2**-10), strict=True):  # whose mean fp16 cannot hold
        save_file({"w": torch.full((2,), value, dtype=torch.float16)}, file)
    (mean,) = mean_weights(files).values()
    assert mean.dtype == torch.float32
    assert mean.tolist() == [1 + 2**-11] * 2


def test_the_columns_at_equal_budget_name_rows_that_an_evaluation_writes():
    """A misspelt field would leave cells empty, which reads as not measured."""
    shipped = Bundle.draft(SHIPPED).metrics()
    for column in (*equal_budget_table.ACCURACY, *equal_budget_table.DETECTION):
        assert rows_where(shipped, column.metric, **column.fields), column.heading
    for column in equal_budget_table.SAMPLES:  # the shipped model's sampler may be another one
        assert rows_where(shipped, column.metric, dataset=column.fields["dataset"]), column.heading


def test_a_completed_row_keeps_figures_of_more_images(tmp_path):
    many = [1] * 60 + [0] * 40
    kept_run(tmp_path, "pgd7", [proportion("accuracy_pgd20", 60, 100, PGD20, "")], [many])
    fewer = proportion("accuracy_pgd20", 5, 10, PGD20, "")
    strong = proportion("accuracy_apgd", 3, 10, replace(PGD20, attack="apgd"), "")
    folder = tmp_path / f"{equal_budget.PREFIX}pgd7"
    equal_budget_rows.keep(folder, [fewer, strong], {fewer.key: np.ones(10, bool), strong.key: np.ones(10, bool)})
    assert {row.metric: row.n for row in read_rows(folder / "metrics.json")} == {"accuracy_pgd20": 100, "accuracy_apgd": 10}
    with np.load(folder / "images.npz") as images:
        assert {key: len(images[key]) for key in images} == {fewer.key: 100, strong.key: 10}


def test_values_of_fewer_images_replace_none_of_more(tmp_path):
    file = tmp_path / "values.npz"
    equal_budget_rows.keep_longer(file, {"nll": np.ones(10), "energy|clean": np.ones(3)})
    equal_budget_rows.keep_longer(file, {"nll": np.zeros(9), "energy|clean": np.zeros(3)})
    with np.load(file) as kept:
        assert (kept["nll"].tolist(), kept["energy|clean"].tolist()) == ([1] * 10, [0] * 3)


@pytest.mark.parametrize(
    ("name", "text"), [("config.json", "[]"), ("config.json", "{"), ("log.jsonl", ""), ("log.jsonl", '{"of": '), ("log.jsonl", None)]
)
def test_a_damaged_record_of_a_run_is_named(tmp_path, name, text):
    (tmp_path / "config.json").write_text('{"stages": [{"epochs": 1, "batch_size": 2}]}')
    (tmp_path / "log.jsonl").write_text('{"of": 3}\n')
    assert equal_budget_table.training_cost(tmp_path, 2) == (1, 2, 12)
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(BundleError, match="is damaged"):
        equal_budget_table.training_cost(tmp_path, 2)


def test_what_evaluate_measures_are_the_measures_of_a_row():
    assert tuple(equal_budget_rows.MEASURES) == equal_budget_entries.MEASURED


def test_short_runs_continue_given_weights(tmp_path, monkeypatch):
    weights = tmp_path / "warm.safetensors"
    plan = equal_budget.Plan(tmp_path / "out", 9, (28, 2), (), 1.0, time.monotonic() + 60, warm=weights)
    called = []

    def call(plan, words, name, what):
        called.append(words)
        made = plan.out / "runs" / name / "stage" / "weights.safetensors"
        made.parent.mkdir(parents=True)
        made.touch()

    monkeypatch.setattr(equal_budget.Plan, "call", call)
    for name in ("pgd7-half", "ebjdat-released"):
        plan.train(name)
    assert [words[words.index("--init") + 1] for words in called] == [str(weights)] * 2
    epochs = [float(next(word for word in words if word.startswith("epochs=")).removeprefix("epochs=")) for words in called]
    passes = [equal_budget.ENTRIES[name].passes for name in ("pgd7-half", "ebjdat-released")]
    assert [a * b for a, b in zip(epochs, passes, strict=True)] == pytest.approx([9, 9], rel=0.01)


def test_the_released_codes_settings_are_those_of_the_reference():
    entry = equal_budget.ENTRIES["ebjdat-released"]
    stage = override(preset(entry.method, "small", "cifar10"), [*entry.settings])
    method = stage.method
    assert (method.w1, method.w2, method.w3 * method.clean_weight, method.w3 * (1 - method.clean_weight)) == (1, 0.1, 1, 1)
    assert (method.inner, method.alignment, method.energy_penalty, method.w1_ramp) == ("released", "released", 0, 0)
    assert (method.attack.steps, method.attack.step_over_eps, method.attack.start) == (5, 0.25, "uniform")
    assert (stage.threat.norm, stage.threat.eps) == ("linf", 4 / 255)  # 8/255 of [-1,1]
    assert (method.chains.steps, method.chains.conditional, method.chains.noise_std, method.data_noise) == (10, False, 0, 0.015)
    assert (type(stage.sharpness).__name__, stage.sharpness.rho, stage.frozen_norm, stage.lr) == ("Asam", 2.0, False, 0.01)


def test_the_table_of_cells_is_that_of_the_json():
    rows = json.loads((ROOT / "benchmarks" / "digits_cells.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert tables.placed(text, "cells", digits_cells.table(rows)) == text, "run python benchmarks/digits_cells.py --table"
    for row in rows:
        for figure, what in (("accuracy_clean", "clean"), ("accuracy_pgd20", "robust")):
            assert row[what].count("1") / len(row[what]) == pytest.approx(row[figure])


def test_the_tables_of_the_recipe_and_its_sampler_are_those_of_the_json():
    rows = json.loads((ROOT / "benchmarks" / "averaged_runs.json").read_text(encoding="utf-8"))
    for name, (mark, table) in averaged_runs.TABLES.items():
        text = (ROOT / "docs" / "decisions" / name).read_text(encoding="utf-8")
        assert tables.placed(text, mark, table(rows)) == text, "run python benchmarks/averaged_runs.py --table"
    for row in (row for row in rows if "robust" in row):
        assert row["robust"].count("1") / row["n"] == pytest.approx(row["value"])
        assert row["clean"].count("1") / row["n_clean"] == pytest.approx(row["accuracy_clean"])


def test_the_robustness_measured_on_a_gpu_is_that_of_the_kept_per_image_results():
    files = {name: ROOT / "benchmarks" / "models" / name / "gpu_images.npz" for name in ("ebjdat", "fgsm-rs", "pgd-at")}
    results = {name: dict(np.load(file)) for name, file in files.items()}
    file = ROOT / "benchmarks" / "gpu_robustness.json"
    rows = {model: parse_rows(of_model, file) for model, of_model in json.loads(file.read_text()).items()}
    assert set(rows) == set(files)
    for model, of_model in rows.items():
        shares = [row for row in of_model if row.metric != "autoattack_warnings"]
        assert shares
        for row in shares:
            good = results[model][row.key]
            assert (len(good), good.mean()) == (row.n, pytest.approx(row.value)), row.metric
    text = (ROOT / "docs" / "gpu.md").read_text()
    for said, metric in (
        ("PGD-20 on cross-entropy", "accuracy_pgd20"),
        ("PGD-20 on the margin, 5 starts", "accuracy_pgd20_restarts"),
        ("APGD-CE and APGD-T", "accuracy_apgd"),
    ):
        (row,) = rows_where(rows["ebjdat"], metric, norm="linf", eps=8 / 255)
        key = row.key
        shares = [results[name][key].mean() for name in files]
        digits = 4 if said == "PGD-20 on cross-entropy" else 3
        cells = [said, *(f"{share:.{digits}f}" for share in shares), equal_budget_table.difference(files["ebjdat"], files["fgsm-rs"], key)]
        assert f"| {' | '.join(cells)} | {len(results['ebjdat'][key]):,} |" in text


def test_an_entry_keeps_what_was_measured_of_itself(tmp_path, monkeypatch):
    plan = equal_budget.Plan(tmp_path, 56, (10, 1), (), 1.0, time.monotonic() + 60)
    weights = tmp_path / "runs" / "pgd7" / "small-pgd-at" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    for file in (weights.parent / "log.jsonl", weights.parent.parent / "config.json"):
        file.write_text("{}")
    save_file({"w": torch.ones(2)}, weights)

    def call(plan, words, name, what):
        folder = Path(words[words.index("--folder") + 1])
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(name))

    monkeypatch.setattr(equal_budget.Plan, "call", call)
    for stale in ("pgd7-seed1", "pgd7-other"):  # of a name that begins alike
        (tmp_path / "measured" / stale).mkdir(parents=True)
        (tmp_path / "measured" / stale / "metrics.json").write_text(json.dumps(stale))
    plan.evaluate("pgd7")
    assert json.loads((tmp_path / "kept" / "wrn28-pgd7" / "metrics.json").read_text()) == "pgd7"
    assert load_file(tmp_path / "kept" / "wrn28-pgd7" / "weights.safetensors")["w"].dtype == torch.float16


def test_rows_of_another_plan_are_not_taken_for_this_ones(tmp_path):
    plan = equal_budget.Plan(tmp_path, 56, (10, 1), (), 1.0, 0.0)
    plan.claim()
    plan.claim()  # the same goes on
    with pytest.raises(ValueError, match="rows of another plan"):
        replace(plan, passes=28).claim()


def test_a_folder_without_rows_has_no_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["equal_budget.py", str(tmp_path), "--table"])
    with pytest.raises(SystemExit):
        equal_budget.main()
    assert "holds no wrn28-NAME/metrics.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (equal_budget, ["models", "--measure", "clean"], "--measure is of --evaluate ROW"),
        (equal_budget, ["models", "--together", "0"], "--together 0: give 1 or more"),
        (equal_budget, ["models", "--evaluate", "pgd7", "--amount", "nosuch=3"], "--amount nosuch=3: give NAME=N"),
        (equal_budget, ["models", "--table"], "images.npz is damaged"),
        (gpu_hours, ["--json", "missing/x.json"], "there is no folder missing"),
        (averaged_runs, ["--json", "missing/x.json"], "there is no folder missing"),
        (averaged_runs, ["--json", "broken.json"], "broken.json holds no list of rows"),
        (averaged_runs, ["--json", "some.json", "--table"], "some.json holds no rows of trades-w1, "),
    ],
)
def test_a_script_tells_what_is_wrong_with_its_words_and_files_before_it_works(tmp_path, monkeypatch, capsys, script, words, said):
    monkeypatch.chdir(tmp_path)
    for name in ("pgd7", "trades"):
        shutil.copytree(ROOT / "benchmarks" / "models" / f"wrn28-{name}", tmp_path / "models" / f"wrn28-{name}")
    (tmp_path / "models" / "wrn28-trades" / "images.npz").write_bytes(b"x")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "some.json").write_text('[{"name": "pgd7"}]')
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_an_average_of_weights_that_are_not_kept_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(equal_budget_rows, "load", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors is not kept"):
        equal_budget_rows.complete(tmp_path, "ebjdat-mean", ["clean"], None)


@pytest.mark.slow
def test_processes_that_share_a_gpu_are_compared_with_one_alone(tmp_path, monkeypatch, capsys):
    words = ["gpu_parallel.py", "--network", "10", "1", "--batch", "8", "--seconds", "0.2", "--start", "0.01"]
    monkeypatch.setattr(sys, "argv", [*words, "--processes", "2"])
    with pytest.raises(SystemExit):
        gpu_parallel.main()
    assert "must begin with 1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "--processes", "1"])
    assert gpu_parallel.main() == 1  # it was not ready within a hundredth of a second
    assert "of 1 processes 1 failed" in capsys.readouterr().err


def test_the_bundled_model_and_its_control_are_rows_at_equal_budget():
    kept, shipped = equal_budget_table.kept_rows(ROOT / "benchmarks" / "models"), Bundle.draft(SHIPPED)
    robust = kept["ebjdat-mean"].best(equal_budget_table.ROBUST)
    assert robust is not None
    assert robust.of == shipped.manifest.files["weights.safetensors"].sha256
    (control,) = rows_where(read_rows(SHIPPED / "control.json"), "accuracy_pgd20", norm="linf", eps=8 / 255, n=10_000)
    assert control == kept[equal_budget_table.CONTROL].best(equal_budget_table.ROBUST)
