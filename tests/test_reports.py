"""Tests of the report and comparison pages: their content, escaping, and that nothing is loaded from elsewhere."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ebjdat_serve.bundle import Bundle
from tests.conftest import DIGITS, ROOT
from training import compare
from training.evaluation import report


def rows_of(page: str) -> int:
    return len(re.findall(r"<tr><td", page))


def self_contained(page: str) -> bool:
    return all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)\s*=\s*"?([^">]*)', page)) and "@import" not in page


@pytest.fixture
def context(tmp_path) -> SimpleNamespace:
    subject = SimpleNamespace(name="<b>net</b>", weights="w" * 64, graph="g" * 64)
    data = SimpleNamespace(name="<i>data</i>", names=tuple("0123456789"))
    ball, warnings = SimpleNamespace(linf=0.2), {"robustness": ["1 < 2 & <script>alert(1)</script>"]}
    return SimpleNamespace(subject=subject, data=data, ball=ball, warnings=warnings, arrays={}, drawings={}, folder=tmp_path)


def test_an_evaluations_page_shows_every_row_and_escapes_every_text(context):
    rows = Bundle.load(DIGITS).metrics()
    file = report.write_evaluation_report(context, rows)
    page = file.read_text()
    assert "<h1>&lt;b&gt;net&lt;/b&gt; on &lt;i&gt;data&lt;/i&gt;</h1>" in page
    assert "robustness: 1 &lt; 2 &amp; &lt;script&gt;" in page
    assert not re.search(r"<(b|i|script)>(?!Masked)", page)
    assert rows_of(page) == len(rows) + len(report.in_short(rows))
    folded = [int(more) for more in re.findall(r"<summary>(\d+) more</summary>", page)]
    assert folded
    assert page.count("<table>") == page.count("<h2>") - 1 + len(folded)  # the notes have none
    assert "Masked gradients" not in page
    assert self_contained(page)


def test_masked_gradients_are_said_first(context, monkeypatch):
    monkeypatch.setattr(report, "failed", lambda rows: "loss_rises, <eps>")
    page = report.write_evaluation_report(context, []).read_text()
    assert "Failed: loss_rises, &lt;eps&gt;. The robust accuracies below cannot be believed." in page


def test_a_comparisons_page_has_a_column_a_model_and_a_row_a_shared_measurement():
    models = [compare.read(ROOT / "benchmarks" / "models" / name) for name in ("standard", "pgd-at", "sada-jem")]
    models[1] = replace(models[1], name="<b>|pgd")
    page, measured = compare.page(models), compare.shared(models, False)
    assert rows_of(page) == len(measured) > 50
    assert page.count('<th class="v">&lt;b&gt;|pgd</th><th class="v">sada-jem</th><th class="v">p, &lt;b&gt;|pgd</th>') == page.count(
        "<table>"
    )
    assert len(re.findall(r'<td class="v">', page)) == 6 * len(measured)  # three values, two p-values, n
    assert "<b>" not in page
    assert page.count("<img ") == 1
    assert self_contained(page)
    lines = compare.markdown(models, short=False).splitlines()
    assert len(lines) == len(measured) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:]} == {10}


def test_the_templates_are_all_used():
    templates = list((ROOT / "training" / "templates").iterdir())
    texts = "".join(file.read_text() for file in (*(ROOT / "training").rglob("*.py"), *templates))
    assert [file.name for file in templates if f'"{file.name}"' not in texts] == []
