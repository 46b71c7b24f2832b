"""What the README says works and is what was measured."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bench import REPEATS, RESULTS
from bench.__main__ import repeats
from bench.publish.tables import DOCUMENTS, NUMBERS, PUBLISHED_RESULTS, ROOT, TABLES, refresh

README = ROOT / "README.md"


def test_python_example(monkeypatch, digits28, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.setattr("model.data.load_dataset", lambda name: digits28)
    exec(example, {})
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)[1])
    assert accuracy > 80


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_and_numbers_are_those_of_the_published_results(document):
    text = (ROOT / document).read_text()
    assert refresh(text, PUBLISHED_RESULTS) == text


def test_every_table_and_number_is_used():
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    assert set(re.findall(r"<!-- ([\w-]+) -->", text)) == {*TABLES, *NUMBERS}


def test_numbers_within_a_sentence_are_renewed():
    text = "takes <!-- vectors-lines -->7<!-- /vectors-lines --> lines"
    number = NUMBERS["vectors-lines"](PUBLISHED_RESULTS)
    assert refresh(text, PUBLISHED_RESULTS) == text.replace(">7<", f">{number}<")
    with pytest.raises(KeyError, match="no-such-number"):
        refresh("<!-- no-such-number -->7<!-- /no-such-number -->", PUBLISHED_RESULTS)


def test_spread_of_ratios_over_runs(tmp_path):
    copy = Path(shutil.copy(PUBLISHED_RESULTS / RESULTS, tmp_path))
    repeats([copy, copy], tmp_path)
    assert NUMBERS["runs"](tmp_path) == "3"
    assert NUMBERS["spread-largest"](tmp_path) == "0"
    runs = json.loads((tmp_path / REPEATS).read_text())
    runs[0][2]["ratio"] *= 1.2
    runs[1][2]["ratio"] /= 1.5
    (tmp_path / REPEATS).write_text(json.dumps(runs))
    assert NUMBERS["spread-largest"](tmp_path) == "80"
    assert NUMBERS["spread-median"](tmp_path) == "0"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert (ROOT / document).parent.joinpath(link).exists(), link
