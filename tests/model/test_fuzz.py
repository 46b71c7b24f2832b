"""A sample of ``python -m tests.soak.fuzz``, and the same mutations chosen and shrunk by hypothesis."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fuzz import READERS, little_memory, outcome, try_inputs
from tests.support.systems import needs_proc


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_sample(name):
    outcomes, findings = try_inputs(name, 0, range(1500))
    assert not findings, findings[0]
    assert outcomes[name, "accepted"] > 0
    assert outcomes[name, "refused"] > 0


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(random=st.randoms(use_true_random=False))
def test_mutants_from_hypothesis(name, random):
    reader = READERS[name]
    content = reader.mutant(random)
    with little_memory(reader.memory):
        outcome(reader, content)


@needs_proc
def test_the_fuzzer_reports_findings(monkeypatch):
    """Input that raises an unexpected error, takes too much memory, or gives a wrong result."""

    def read(content):
        if content == "error":
            raise KeyError(content)
        if content == "memory":
            bytearray(10**9)
        assert content != "wrong"

    for content in ("error", "memory", "wrong"):
        reader = READERS["idx"]._replace(mutant=lambda random, content=content: content, read=read)
        monkeypatch.setitem(READERS, "bad", reader)
        outcomes, (finding,) = try_inputs("bad", 7, range(3, 4))
        assert outcomes == {("bad", "finding"): 1}
        assert finding.endswith("repeat it with --seed 7 --repeat bad:3\n")
