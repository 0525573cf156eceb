"""Assertion that every figure of a detection score has one of max softmax to compare with."""

from dataclasses import replace


def assert_max_softmax_beside(rows, score):
    twins = {row.key for row in rows if row.score == "max_softmax"}
    scored = [row for row in rows if row.score == score and row.baseline is None]
    assert scored
    for row in scored:
        metrics = {f"{kind}_{score}": f"{kind}_max_softmax" for kind in ("auroc", "aupr", "fpr95")}
        assert replace(row, score="max_softmax", metric=metrics.get(row.metric, row.metric)).key in twins, row.key
