"""What the README says works and is what was measured."""

import re

import pytest

from bench.tables import PUBLISHED_RESULTS, ROOT, refresh

README = ROOT / "README.md"


def test_python_example(monkeypatch, digits28, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.setattr("model.data.load_dataset", lambda name: digits28)
    exec(example, {})
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)[1])
    assert accuracy > 80


def test_tables_are_those_of_the_published_results():
    assert refresh(README.read_text(), PUBLISHED_RESULTS) == README.read_text()


@pytest.mark.parametrize("document", ["README.md"])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / document).parent.joinpath(link).exists(), link
