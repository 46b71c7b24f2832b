"""The READMEs' examples, numbers, claims and links."""

import re

import pytest

from bench.publish.tables import DOCUMENTS, NUMBERS, PUBLISHED_RESULTS, ROOT, TABLES, main_folder, refresh
from tests.support.claims import CLAIMED

README = ROOT / "README.md"


def test_python_example(monkeypatch, digits28, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr("model.data.load_dataset", lambda name: digits28)
    exec(example, {})
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)[1])
    assert accuracy > 80


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_and_numbers_match_the_published_results(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert refresh(text, PUBLISHED_RESULTS) == text


def test_every_table_is_used_and_every_marker_known():
    text = "".join((ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS)
    markers = set(re.findall(r"<!-- ([\w-]+) -->", text))
    assert set(TABLES) <= markers
    assert markers <= {*TABLES, *NUMBERS}


@pytest.mark.parametrize(
    "name", ["ablation", "competitors", "forms", "growth", "ladder", "pictures", "steps", "workers"]
)
def test_a_table_of_one_machine_says_where_it_is_from(name):
    machine = main_folder(PUBLISHED_RESULTS).machine
    *_, first, second = TABLES[name](PUBLISHED_RESULTS).splitlines()
    assert f"{machine.name} ({machine.cpu})" in first
    assert re.search(r"; commit \w+, \d{4}-\d\d-\d\d$", second)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_only_generated_text_claims_speed(document):
    """Text between markers is generated, including the quantifier."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    sentences = re.split(r"(?<=[.:?!])\s|\n\n", text)
    assert [sentence for sentence in sentences if CLAIMED.search(sentence)] == []


@pytest.mark.parametrize(
    "text",
    [
        "It is Slower than",
        "ahead of OpenBLAS",
        "it pays off",
        "it wins",
        "passes OpenBLAS",
        "passes BLAS",
        "loops reach three quarters of it (Zen 5)",
        "from loops to BLAS speed",
        "to the speed\nof OpenBLAS",
    ],
)
def test_these_words_claim_speed(text):
    assert CLAIMED.search(text)


def test_numbers_within_a_sentence_are_updated():
    text = "peaks at <!-- peak -->7<!-- /peak --> MB"
    number = NUMBERS["peak"](PUBLISHED_RESULTS)
    assert refresh(text, PUBLISHED_RESULTS) == text.replace(">7<", f">{number}<")
    with pytest.raises(KeyError, match="no-such-number"):
        refresh("<!-- no-such-number -->7<!-- /no-such-number -->", PUBLISHED_RESULTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert (ROOT / document).parent.joinpath(link).exists(), link
