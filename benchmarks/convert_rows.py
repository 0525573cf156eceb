# ruff: noqa
# mypy: ignore-errors
"""Thrown away once it has run: rows whose `dataset` and `protocol` were sentences become rows of fields, checked one by one."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ebjdat_serve.bundle import sha256, write_json
from ebjdat_serve.rows import (
    ALL_SETS,
    CONTROL,
    EXTRACTORS,
    FRESH,
    PRIOR,
    Images,
    data_words,
    images_key,
    parse_row,
    protocol_words,
    to_json,
)
from training.evaluation.metrics import wilson

ROOT = Path(__file__).parent.parent
PGD_AT = sha256(ROOT / "benchmarks" / "models" / "pgd-at" / "weights.safetensors")
SCORE = "energy_entropy|energy|max_softmax|gradient_norm"
THREAT = r"(?P<norm>l-inf|l2) (?P<eps>[\d./]+)"
SAMPLER = r"(?P<sampler>\d+) SGLD steps of (?P<step_size>[\d.]+)(?:, gradient clip (?P<grad_clip>[\d.]+))?, noise (?P<noise_std>[\d.]+), from the prior(?:; same seeds)?"
EXTRACTOR = "|".join(re.escape(text) for text in (*EXTRACTORS.values(), "64 features of ResNet-20"))


def eps_of(text):
    value = int(text.split("/")[0]) / 255 if "/" in text else float(text)
    return value


def sha(short):
    assert PGD_AT.startswith(short), short
    return PGD_AT


def images_of(text, home):
    """The old `dataset` sentence -> (fields of images, against or None, against_n or None, n or None)."""
    where = re.match(r"(\w+ test) vs (.*)$", text)
    if where:
        found, _, _, n = images_of(where[2], home)
        return found, where[1], None, n
    counted = re.fullmatch(
        r"(\d+) (fresh samples|prior draws|samples of the control (\S+) \((\w+)\)|test images, the floor at n = (\d+))(?: vs ([\d,]+) training images)?",
        text,
    )
    if counted:
        n, what, control, of, floor, reals = counted.groups()
        if floor:
            assert floor == n
            found = {"dataset": home, "split": "test"}
        elif control:
            found = {"dataset": CONTROL, "control": control, "control_of": sha(of)}
        else:
            found = {"dataset": {"fresh samples": FRESH, "prior draws": PRIOR}[what]}
        return found, f"{home} train" if reals else None, int(reals.replace(",", "")) if reals else None, int(n)
    attacked = re.fullmatch(r"(PGD-20|transferred|AutoAttack) (\S+) on (\w+) test(?:, (fooled|not fooled))?", text)
    if attacked:
        kind, eps, data, subset = attacked.groups()
        found = {"dataset": data, "split": "test", "attack": {"PGD-20": "pgd", "transferred": "transfer", "AutoAttack": "autoattack"}[kind]}
        found |= {
            "norm": "linf",
            "eps": eps_of(eps),
            **({"steps": 20} if kind == "PGD-20" else {}),
            **({"subset": subset} if subset else {}),
        }
        return found, None, None, None
    corrupted = re.fullmatch(r"(\w+) test, ([a-z ]+), severity (\d), own recipe", text)
    if corrupted:
        return (
            {"dataset": corrupted[1], "split": "test", "corruption": corrupted[2], "severity": int(corrupted[3]), "recipe": "own"},
            None,
            None,
            None,
        )
    pooled = re.fullmatch(r"(\w+) test corrupted by our own recipe, severity (\d)", text)
    if pooled:
        return {"dataset": pooled[1], "split": "test", "severity": int(pooled[2]), "recipe": "own", "kinds": 12}, None, None, None
    shifted = re.fullmatch(r"(\w+) test after (.+)", text)
    if shifted:
        return {"dataset": shifted[1], "split": "test", "shift": shifted[2]}, None, None, None
    split = re.fullmatch(r"(\w+) (test|selection split)", text)
    if split:
        return {"dataset": split[1], "split": split[2].split()[0]}, None, None, None
    if text == "all sets above":
        return {"dataset": ALL_SETS}, None, None, None
    if text == "all sets above, of attacks the fooled images":
        return {"dataset": ALL_SETS, "subset": "fooled"}, None, None, None
    if text == "the other half of the clean images":
        return {"dataset": home, "split": "test", "subset": "one half"}, f"{home} test", None, None
    if text == "generated, fresh":
        return {"dataset": FRESH}, None, None, None
    if at_once := re.fullmatch(r"(\d+) at once, (\w+)", text):
        return {"dataset": FRESH, "batch": int(at_once[1]), "device": at_once[2]}, None, None, int(at_once[1])
    if text == "blank pictures":
        return {"dataset": "blank images"}, None, None, None
    if text in ("uniform noise", "interpolations", "svhn_train_first1080", "cifar100_test_3000"):
        return {"dataset": text}, None, None, None
    raise ValueError(f"dataset {text!r}")


NORMS = {"l-inf": "linf", "l2": "l2"}


def threat(found):
    return {"norm": NORMS[found["norm"]], "eps": eps_of(found["eps"])}


def pgd(found):
    return {"attack": "pgd", "objective": {"cross-entropy": "ce", "the margin": "margin"}[found["on"]], "steps": 20, **threat(found)}


def sampler(found):
    if found["sampler"] is None:
        return {"steps": 0} if False else {}
    return {"steps": int(found["sampler"]), "step_size": float(found["step_size"]), "noise_std": float(found["noise_std"])} | (
        {"grad_clip": float(found["grad_clip"])} if found["grad_clip"] else {}
    )


def generated(m, metric):
    """Fields of a generation protocol: extractor; how; more."""
    said = {text: name for name, text in EXTRACTORS.items()} | {"64 features of ResNet-20": "resnet20"}
    fields = sampler(m.groupdict())
    if m["extractor"]:
        fields["extractor"] = said[m["extractor"]]
    elif metric.startswith("class_agreement_") and metric != "class_agreement_own":
        fields["extractor"] = metric.removeprefix("class_agreement_")
    more = m["more"] or ""
    if found := re.fullmatch(r"; cubic kernel, unbiased, mean of (\d+) disjoint blocks", more):
        fields["blocks"] = int(found[1])
    elif found := re.fullmatch(r"; k = 3, (\d+) reals", more):
        fields |= {"k": 3, "reals": int(found[1])}
    elif found := re.fullmatch(r"; extrapolated to infinitely many of these, not of the (\d+) reals: read it beside the floor", more):
        fields["check_against_n"] = int(found[1])
    else:
        assert not more, more
    return fields


def precise(fields):
    return fields


RULES = [
    (
        rf"PGD-20 on (?P<on>cross-entropy|the margin), {THREAT}, step eps/4, (?P<starts>\d) random starts?, each iterate counts",
        lambda m, _: {**pgd(m), "step_over_eps": 0.25, "restarts": int(m["starts"]), "iterate": "each"},
    ),
    (
        rf"PGD-20 on the surrogate (?P<name>\S+) \((?P<short>\w+)\), {THREAT}, last iterate",
        lambda m, _: {
            "attack": "transfer",
            "steps": 20,
            "surrogate": m["name"],
            "surrogate_of": sha(m["short"]),
            "iterate": "last",
            **threat(m),
        },
    ),
    (rf"(?:times that the package warned: )?APGD-CE and APGD-T of AutoAttack, {THREAT}", lambda m, _: {"attack": "apgd", **threat(m)}),
    (
        rf"(?:times that the package warned: )?official standard AutoAttack, {THREAT}(?:, first (?P<n>\d+) images)?",
        lambda m, _: {"attack": "autoattack", "version": "standard", **threat(m), **({"n": int(m["n"])} if m["n"] else {})},
    ),
    (
        rf"Square alone on what is served, (?P<q>\d+) queries, {THREAT}",
        lambda m, _: {"attack": "square", "queries": int(m["q"]), **threat(m)},
    ),
    (
        rf"left by every one of (?P<names>[\w, ]+); {THREAT}",
        lambda m, _: {"attack": "worst_case", "attacks": [f"accuracy_{name}" for name in m["names"].split(", ")], **threat(m)},
    ),
    (
        r"what is served|served graph|served|nats|fitted to p\(y\|x\)|12 kinds of each image|share with the higher AUROC|1 when any check but determinism failed"
        r"|wrong after the attack, of the images right before it|mean energy less that of clean test images, nats"
        r"|mean of E\(x_adv\) - E\(x\) on the same images, nats|\|gap\| in deviations of the clean energies|Wasserstein-1 in deviations of the clean energies"
        r"|overlap of histograms, square root of n bins|floor of overlaps|mean E\(x_adv\) - E\(x\), nats|\|mean E\(x_adv\) - E\(x\)\| / sd E\(x\)"
        r"|largest difference from fp32's logits over the largest logit|largest difference from fp32's energy, nats"
        r"|mean distance from fp32's energy over the deviation of fp32's energies|share of images whose class differs from fp32's"
        r"|served graph: fp32's accuracy minus this one's|distance from that interval|classify graph; weights.safetensors is shared",
        lambda m, _: {},
    ),
    (
        r"(?P<t>temperature 1|fitted temperature), normal 95 % interval",
        lambda m, _: {"temperature": {"temperature 1": "1"}.get(m["t"], "fitted")},
    ),
    (
        r"15 bins, (?P<t>temperature 1|fitted temperature)(?P<floor>: labels drawn from p itself, mean of 100 draws)?",
        lambda m, _: {"bins": 15, "temperature": {"temperature 1": "1"}.get(m["t"], "fitted"), **({"draws": 100} if m["floor"] else {})},
    ),
    (r"mean cross-entropy after (?P<s>\d+) steps of PGD", lambda m, _: {"attack": "pgd", "objective": "ce", "steps": int(m["s"])}),
    (
        r"accuracy under PGD-20 at l-inf (?P<eps>\S+) is (?P<v>[\d.]+), at most 0.02",
        lambda m, _: {
            "attack": "pgd",
            "steps": 20,
            "norm": "linf",
            "eps": eps_of(m["eps"]),
            "observed": {"accuracy": float(m["v"])},
            "limit": 0.02,
        },
    ),
    (
        r"mean cross-entropy from 1 to 50 steps: (?P<a>\S+) to (?P<b>\S+), never falling",
        lambda m, _: {"attack": "pgd", "objective": "ce", "steps": 50, "observed": {"first": float(m["a"]), "last": float(m["b"])}},
    ),
    (
        r"no usable gradient at (?P<v>[\d.]+) of the images, at most 0.01",
        lambda m, _: {"observed": {"share": float(m["v"])}, "limit": 0.01},
    ),
    (
        r"two answers differ on (?P<v>[\d.]+) of the images; if they do, gradients are averaged",
        lambda m, _: {"observed": {"share": float(m["v"])}},
    ),
    (
        r"accuracy under uniform noise in the ball (?P<a>[\d.]+), no lower than (?P<b>[\d.]+) under PGD",
        lambda m, _: {"observed": {"noise": float(m["a"]), "pgd": float(m["b"])}},
    ),
    (
        r"(?P<k>transfer|square) breaks (?P<a>[\d.]+) of the images that PGD-20 on both objectives leaves, at most 0.02; (?P=k) (?P<b>[\d.]+), white box (?P<w>[\d.]+)",
        lambda m, _: {"observed": {"alone": float(m["a"]), "black_box": float(m["b"]), "white_box": float(m["w"])}, "limit": 0.02},
    ),
    (
        rf"alpha (?P<alpha>[\d.]+)(?:, score (?P<score>{SCORE}))?(?:, (?P<own>its own calibration|fp32's calibration))?"
        r"(?:, Beta-binomial 99 % interval \[(?P<low>[\d.]+), (?P<high>[\d.]+)\])?",
        lambda m, p: {
            "alpha": float(m["alpha"]),
            **({"score": m["score"]} if m["score"] else {}),
            **({"calibration": p if "own" in m["own"] else "fp32"} if m["own"] else {}),
            **({"expected": [float(m["low"]), float(m["high"])]} if m["low"] else {}),
        },
    ),
    (
        rf"score (?P<score>{SCORE}), positives are the other set(?:, (?P<share>0\.\d{{3}}) of all)?",
        lambda m, _: {"score": m["score"], **({"share": m["share"]} if m["share"] else {})},
    ),
    (
        rf"score (?P<score>{SCORE}), positives are the (?P<subset>fooled|not fooled), negatives all clean images of the attack",
        lambda m, _: {"score": m["score"], "subset": m["subset"]},
    ),
    (r"E\(x\), positives are the other set", lambda m, _: {"score": "energy"}),
    (rf"PGD-20 on (?P<on>cross-entropy), {THREAT}, all images", lambda m, _: {**pgd(m), "score": "energy"}),
    (r"share of the other set that passes as clean when 95 % of clean images do", lambda m, _: {}),
    (
        rf"score (?P<score>{SCORE}); PGD-40 from 2 starts and Square of (?P<q>\d+) queries on the score, {THREAT}, moves (?P<moved>nothing|junk|clean images|both)",
        lambda m, _: {
            "score": m["score"],
            "attack": "score",
            "steps": 40,
            "restarts": 2,
            "queries": int(m["q"]),
            **threat(m),
            "moved": {"nothing": "none", "junk": "ood", "clean images": "clean", "both": "both"}[m["moved"]],
        },
    ),
    (
        rf"alpha (?P<alpha>[\d.]+), score (?P<score>{SCORE}); {THREAT}, PGD-50 joint, selective and orthogonal, 2 starts each, and Square of (?P<q>\d+) queries on both aims;"
        " points of APGD-CE and APGD-T that pass",
        lambda m, _: {
            "alpha": float(m["alpha"]),
            "score": m["score"],
            "attack": "evasion",
            "steps": 50,
            "restarts": 2,
            "queries": int(m["q"]),
            **threat(m),
        },
    ),
    (
        rf"a detector robust at eps implies some classifier robust at eps/2 \(arXiv 2107.11630\); this one under PGD-20 on (?P<on>the margin), {THREAT}, 2 random starts",
        lambda m, _: {**pgd(m), "restarts": 2},
    ),
    (
        rf"released-code: PGD-20, 8/255 of \[-1,1\] = {THREAT}, step eps/8, last iterate",
        lambda m, _: {"attack": "pgd", "steps": 20, "step_over_eps": 0.125, "iterate": "last", **threat(m)},
    ),
    (
        rf"released-code: APGD-CE 20, untargeted APGD-DLR 20, FAB-T 20 clamped to the wrong box, Square 5,000, 8/255 of \[-1,1\] = {THREAT}",
        lambda m, _: {"attack": "released_autoattack", "steps": 20, "queries": 5000, **threat(m)},
    ),
    (
        rf"median l2 distance to the nearest over test images' \((?P<reals>\d+)\); {SAMPLER}",
        lambda m, _: {"reals": int(m["reals"]), **sampler(m.groupdict())},
    ),
    (
        rf"share nearer than half of the nearest test image's distance, (?P<v>[\d.]+) in pixels of \[0,1\]; {SAMPLER}",
        lambda m, _: {"observed": {"nearest_test": float(m["v"])}, **sampler(m.groupdict())},
    ),
    (rf"(?:(?P<extractor>{EXTRACTOR}); )?(?:{SAMPLER}|no step|real against real)(?P<more>;.*)?", generated),
    (
        rf"PGD-20 made on the fp32 net, {THREAT}, last iterate(?:: fp32's accuracy minus this one's)?",
        lambda m, _: {"attack": "transfer", "steps": 20, "surrogate": "fp32", "iterate": "last", **threat(m)},
    ),
    (
        rf"Square on the graph itself, (?P<q>\d+) queries, {THREAT}(?:: fp32's accuracy minus this one's)?",
        lambda m, _: {"attack": "square", "queries": int(m["q"]), **threat(m)},
    ),
    (r"pixels of \[0,1\], after two Langevin steps", lambda m, _: {"steps": 2}),
    (
        r"images/s over fp32's, batch (?P<batch>\d+), one CPU thread, calls interleaved, 20th percentile of 40 CPU times",
        lambda m, _: {"batch": int(m["batch"]), "threads": 1, "n": 40},
    ),
]


def protocol_of(text, metric, precision):
    for pattern, make in RULES:
        if m := re.fullmatch(pattern, text):
            return make(m, metric if make is generated else precision)
    raise ValueError(f"protocol {text!r} of {metric}")


def convert(old, home):
    """One row, all but what only its file tells."""
    fields, against, against_n, n = images_of(old["dataset"], home)
    assert n in (None, old["n"]), old
    precision = next((p for p in ("fp16", "bf16", "int8") if old["metric"].endswith(f"_{p}")), None)
    how = protocol_of(old["protocol"], old["metric"], precision)
    assert how.pop("n", old["n"]) == old["n"]
    assert how.pop("check_against_n", against_n) == against_n
    assert how.get("subset", fields.get("subset")) == fields.get("subset")
    share = how.pop("share", None)
    for name in set(how) & set(fields):
        assert how[name] == fields[name], (name, old)
    made = {**fields, **how}
    for name, value in (("against", against), ("against_n", against_n), ("precision", precision)):
        if value is not None:
            made[name] = value
    metric = old["metric"]
    if metric.startswith("check_"):
        made["check"] = metric.removeprefix("check_")
    if metric.startswith("fpr95_"):
        made["score"] = metric.removeprefix("fpr95_")
    if metric.startswith("sets_better_than_"):
        rest = metric.removeprefix("sets_better_than_")
        made["baseline"] = next(
            s for s in ("energy", "max_softmax") if rest.startswith(f"{s}_") and rest.removeprefix(f"{s}_") in SCORE.split("|")
        )
        made["score"] = rest.removeprefix(f"{made['baseline']}_")
    if metric in ("nll", "brier") or (metric.startswith("ece")):
        assert "temperature" in made
    keep = {
        name: old[name] for name in ("metric", "value", "n", "of", "seed", "interval", "stderr", "part", "provider", "fp32") if name in old
    }
    if "interval" in old:
        plain = list(wilson(round(old["value"] * old["n"]), old["n"]))
        made["interval_kind"] = "wilson" if np.allclose(plain, old["interval"], atol=1e-12) else "normal"
        assert (made["interval_kind"] == "normal") == (
            metric in ("nll", "brier", "energy_mean", "accuracy_corrupted_mean", "energy_gap", "joint_energy_gap")
        ), old
    return {**keep, **made}, share


def converted(old, home):
    """A file's rows: what one row says with the others' help is filled in."""
    power = {(r["dataset"]): r["n"] for r in old if r["metric"] == "flag_power"}
    clean = max((r["n"] for r in old if r["metric"] in ("accuracy_clean", "flag_rate_clean")), default=None)
    hostile = next((r["n"] for r in old if r["metric"] == "accuracy_at_half_eps"), None)
    ball = next((r["protocol"] for r in old if r["metric"] == "accuracy_at_eps"), None)
    rows, interval = [], {}
    for row in old:
        new, share = convert(row, home)
        name, metric = row["dataset"].split(" vs ")[-1], row["metric"]
        if metric == "auroc_robust_ood":
            new["against_n"] = hostile
            assert 0 < row["n"] - hostile <= hostile
        elif "against" in new and "score" in new:
            new["against_n"] = row["n"] if metric.startswith("fpr95") else row["n"] - power[name]
            if metric.startswith("fpr95"):
                assert row["n"] == power[name]
                twin = next(r for r in old if r["metric"] == f"auroc_{new['score']}" and r["dataset"] == row["dataset"])
                new["against_n"] = twin["n"] - row["n"]
        if share:
            assert f"{(row['n'] - new['against_n']) / row['n']:.3f}" == share, row
        if metric.startswith("sets_better_than_"):
            new |= {"against": f"{home} test", "against_n": clean}
        if row.get("part") == "landscape" and "other half" in row["dataset"]:
            new["against_n"] = row["n"]
        elif row.get("part") == "landscape":
            new |= {"against": f"{home} test", "against_n": clean}
        if metric == "loss_at_steps":
            new |= {"norm": "linf", "eps": eps_of(re.search(r"l-inf (\S+),", ball)[1])}
        if metric.startswith("flag_rate_clean_") and "expected" in new and new.get("precision"):
            interval = {name: new[name] for name in ("alpha", "calibration", "expected")}
        if metric.startswith("flag_rate_excess_"):
            new |= interval
        if "against" in new:
            new["against"], new["against_split"] = new["against"].split()
        rows.append(parse_row(new, f"{metric}"))
    return rows


def verify(old, new, file):
    assert len(old) == len(new)
    lost = defaultdict(Counter)
    for a, b in zip(old, new, strict=True):
        c = to_json(b)
        for name in ("metric", "value", "n", "seed", "of", "interval", "stderr", "part", "provider", "fp32"):
            assert repr(a.get(name)) == repr(c.get(name)), (name, a, c)
        text = f"{data_words(b)} {protocol_words(b)} {json.dumps(c)}".replace(",", "")
        for token in re.findall(r"[A-Za-z_][\w'-]*|\d[\d./]*", f"{a['dataset']} {a['protocol']}".replace(",", "")):
            if token.strip(".") not in text:
                lost[token][f"{a['dataset']} | {a['protocol']}  =>  {data_words(b)} | {protocol_words(b)}"] += 1
    keys = Counter((row.part, row.key) for row in new)
    assert max(keys.values()) == 1, [key for key, n in keys.items() if n > 1]
    assert [parse_row(json.loads(json.dumps(to_json(row))), "again") for row in new] == new
    return lost


def home_of(file):
    return "digits" if "digits" in str(file) else "cifar10"


def npz(file, rename):
    with np.load(file) as stored:
        before = {name: stored[name] for name in stored.files}
    after = {rename(name): value for name, value in before.items()}
    assert len(after) == len(before)
    np.savez_compressed(file, **after)
    with np.load(file) as stored:
        for (_, a), b in zip(before.items(), after, strict=True):
            assert a.dtype == stored[b].dtype and (a == stored[b]).all()
    return after


def main():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True).stdout.split()
    lost = defaultdict(Counter)
    write = "--write" in sys.argv
    for name in names:
        file, home = ROOT / name, home_of(name)
        if file.name in ("metrics.json", "baseline.json"):
            old = json.loads(file.read_text(encoding="utf-8"))
            new = converted(old, home)
            for token, where in verify(old, new, file).items():
                lost[token] += where
            print(f"{name}: {len(new)} rows")
            if write:
                write_json(file, [to_json(row) for row in new])
        elif file.name == "gpu_robustness.json":
            old = json.loads(file.read_text(encoding="utf-8"))
            by = defaultdict(list)
            for row in old:
                by[row.pop("model")].append(row)
            new = {model: converted(rows, home) for model, rows in by.items()}
            for model, rows in by.items():
                for token, where in verify(rows, new[model], file).items():
                    lost[token] += where
            if write:
                write_json(file, {model: [to_json(row) for row in rows] for model, rows in new.items()})
        elif file.name == "public_nets.json":
            old, new = json.loads(file.read_text(encoding="utf-8")), []
            for row in old:
                metric, model = row["name"].split()
                found = {"metric": metric, **{key: row[key] for key in ("value", "n", "seed", "of", "interval")}, "interval_kind": "wilson"}
                found |= {"dataset": "cifar10", "split": "test"}
                more = {}
                if m := re.fullmatch(r"APGD-CE and APGD-T, l-inf 2/255, first 1000; known: at most (.*)", row["protocol"]):
                    found |= {"attack": "apgd", "norm": "linf", "eps": 2 / 255}
                    more = {"known_at_most": float(m[1])}
                elif m := re.fullmatch(r"standard AutoAttack of (\w+), l-inf 2/255, first 100", row["protocol"]):
                    found |= {"attack": "autoattack", "version": "standard", "norm": "linf", "eps": 2 / 255}
                    more = {"implementation": m[1]}
                else:
                    assert row["protocol"] == "CIFAR-10 test"
                assert all(np.allclose(wilson(round(row["value"] * row["n"]), row["n"]), row["interval"]) for _ in "1")
                new.append({"name": row["name"], "unit": row["unit"], "model": model, **more, **to_json(parse_row(found, name))})
            if write:
                write_json(file, new)
        elif file.name in ("images.npz", "gpu_images.npz"):

            def key(text, home=home):
                metric, where, protocol = text.split(" | ", 2)
                with np.load(file) as stored:
                    n = len(stored[text])
                new, _ = convert(
                    {"metric": metric, "dataset": where, "protocol": protocol, "n": n, "value": 0.0, "of": "", "seed": 0}, home
                )
                return parse_row(new, text).key

            if write:
                after = npz(file, key)
            else:
                with np.load(file) as stored:
                    after = {key(text): stored[text] for text in stored.files}
                    assert len(after) == len(stored.files)
            told = json.loads((file.parent / "metrics.json").read_text(encoding="utf-8"))
            known = {row.key for row in (converted(told, home) if "protocol" in told[0] else [parse_row(row, name) for row in told])}
            print(f"{name}: {len(after)} arrays, {len(set(after) & known)} of rows of metrics.json")
        elif file.name == "arrays.npz":

            def set_of(text, home=home):
                which, _, field = text.rpartition("|")
                found = {"dataset": home, "split": "test"} if which == "clean" else images_of(which, home)[0]
                return f"{images_key(Images(**found))}|{field}"

            if write:
                after = npz(file, set_of)
            else:
                with np.load(file) as stored:
                    after = [set_of(text) for text in stored.files]
            print(name, len(after))
    for token, where in lost.items():
        print("not in the new words or fields:", token, sum(where.values()))
        for text, count in where.most_common(1):
            print("    ", text)


if __name__ == "__main__":
    main()
