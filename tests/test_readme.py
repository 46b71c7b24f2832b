"""What the README says works and is what was measured."""

import re

import pytest

from bench.tables import PUBLISHED_RESULTS, ROOT, refresh

README = ROOT / "README.md"
DOCUMENTS = ("README.md", "kernels/README.md")


def test_python_example(monkeypatch, digits28, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.setattr("model.data.load_dataset", lambda name: digits28)
    exec(example, {})
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)[1])
    assert accuracy > 80


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_are_those_of_the_published_results(document):
    text = (ROOT / document).read_text()
    assert refresh(text, PUBLISHED_RESULTS) == text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / document).parent.joinpath(link).exists(), link
