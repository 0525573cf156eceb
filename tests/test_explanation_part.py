"""The part "explanation" of the evaluation, of the digits bundle and of a subject that an oracle judges."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ebjdat_serve.bundle import Bundle, sha256
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import first, rows_where
from tests.conftest import DIGITS
from training.data.datasets import load
from training.evaluate import evaluate
from training.evaluation import explanation
from training.evaluation.context import SUITES
from training.evaluation.evaluated_model import open_weights
from training.evaluation.explanation import MODELS, RANDOM, RUNNER_UP, Explain, oracle_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBJDAT_RUNS", str(tmp_path_factory.mktemp("runs")))
        return evaluate(Bundle.load(DIGITS), load("digits"), SUITES["quick"].at_most(6), parts=("explanation",)).rows


def test_the_digits_have_validity_and_distances_of_every_search(rows):
    for target in (RUNNER_UP, RANDOM):
        shares = {row.probability: row for row in rows_where(rows, "explanation_valid", objective=target, norm="l2")}
        assert set(shares) == {None, 0.5}
        assert shares[None].value >= shares[0.5].value
        assert shares[None].n == 6
        distance = first(rows, "explanation_l2_median", objective=target, norm="l2", probability=None)
        assert 0 < distance.value <= distance.eps == 4.0
        assert first(rows, "explanation_l1_median", objective=target, norm="l2", probability=None).value > distance.value
    assert not rows_where(rows, "explanation_agreement_oracle")  # no robust network of digits is kept


def test_a_counterfactual_of_the_evaluation_is_of_its_class_by_the_evaluated_model(test_images):
    subject = open_weights(MODELS / "pgd-at" / "weights.safetensors", torch.device("cpu"))
    image = to_unit(test_images[0][4:8])
    target = (subject.logits(image).argmax(axis=1) + 1) % 10
    found = Explain("l2", 6.0, 0.0).run(subject, image, target)
    assert found["valid"].any()
    said = subject.logits(to_unit(found["image"])).argmax(axis=1)
    np.testing.assert_array_equal(said[found["valid"]], target[found["valid"]])


def test_no_network_judges_itself(tmp_path):
    """The oracle is the first of the list that is not the subject, by the sha256 of its weights."""

    def judge(name):
        file = MODELS / name / "weights.safetensors"
        subject = SimpleNamespace(weights=sha256(file), device=torch.device("cpu"))
        c = SimpleNamespace(subject=subject, data=SimpleNamespace(name="cifar10"), ledger=SimpleNamespace(folder=tmp_path, processes=1))
        return oracle_of(c).subject.name

    assert judge("standard") == judge("pgd-at") == explanation.ORACLES[0]
    assert judge(explanation.ORACLES[0]) == explanation.ORACLES[1]
