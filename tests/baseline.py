"""Wherever a detection score has a figure, max softmax has one beside it."""

import re


def assert_max_softmax_beside(rows, score):
    twins = {identity(row, "max_softmax", score) for row in rows if of_score(row, "max_softmax")}
    scored = [row for row in rows if of_score(row, score) and not row["metric"].startswith("sets_better")]
    assert scored
    for row in scored:
        assert identity(row, score, score) in twins, (row["metric"], row["dataset"], row["protocol"])


def of_score(row, score):
    return bool(re.search(rf"score {score}(?!\w)", row["protocol"])) or row["metric"].endswith(f"_{score}")


def identity(row, old, new):
    protocol = re.sub(r"interval \[[^]]*\]", "", row["protocol"].replace(f"score {old}", f"score {new}"))
    return row["metric"].replace(old, new), row["dataset"], protocol
