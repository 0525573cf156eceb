"""Tests of sets of strange images: a part of a set that is sorted by class has every class."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ebjdat_serve.contract import Input
from training.data.image_folders import load_images, spread
from training.evaluation import hostile, ood
from training.methods.adversary import Threat


@pytest.mark.parametrize(("count", "most"), [(10, None), (10, 10), (3, 10), (0, 5)])
def test_a_small_set_is_taken_whole(count, most):
    assert spread(count, most).tolist() == list(range(count))


@pytest.mark.parametrize(("count", "most"), [(3000, 50), (3000, 2000), (11, 10), (1000, 1)])
def test_a_part_is_drawn_at_equal_distances_without_repeats(count, most):
    places = spread(count, most)
    assert len(set(places.tolist())) == most
    assert places[0] == 0
    assert most == 1 or places[-1] == count - 1
    assert most == 1 or np.ptp(np.diff(places)) <= 1


def test_a_part_of_a_folder_has_all_classes(tmp_path):
    for shade, name in enumerate("abcde"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("L", (8, 8), 50 * shade).save(tmp_path / name / f"{i}.png")
    drawn = load_images(str(tmp_path), Input(8, 8), 5)
    assert sorted(drawn[:, 0, 0, 0].tolist()) == [0, 50, 100, 150, 200]


def test_attacked_and_looked_at_parts_of_a_sorted_set_have_all_classes(monkeypatch):
    ordered = np.arange(100, dtype=np.float32).reshape(100, 1, 1, 1)  # the values are the places in the set
    attacked = []

    def run(title, todo):
        attacked.extend(todo[2][1].ravel().tolist())
        raise Done

    c = SimpleNamespace(
        suite=SimpleNamespace(test=5, hostile=5, queries=1),
        ball=SimpleNamespace(threats=lambda: (Threat("linf", 0.1),)),
        ledger=SimpleNamespace(run=run),
        test=lambda n: (ordered[:n], np.zeros(n, np.int64)),
        look=lambda images, task, image: image.ravel().tolist(),
    )
    for module in (hostile, ood):
        monkeypatch.setattr(module, "ood_sets", lambda c: [("cifar100_test_3000", ordered)])
    with pytest.raises(Done):
        next(hostile.robust_ood_rows(c, SimpleNamespace(score="energy", weight=0.0)))
    assert attacked == [0, 25, 50, 74, 99]
    assert list(ood.strange(c).values()) == [attacked]


class Done(Exception):
    """The attack has been given its images."""
