"""front.json: records that are read back as they were written, in JSON that anyone reads; files of before open."""

from __future__ import annotations

import json

import pytest

from helpers.tables import larger
from messnet.errors import RunError
from messnet.run.choosing import search_all
from messnet.searching import words
from messnet.searching.findings import Findings
from messnet.searching.grid import Grid
from messnet.searching.options import Protocol, SearchOptions


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("protocol", ["cross_fitted", "two_halves"])
def test_what_is_written_is_read_back(protocol: Protocol) -> None:
    tables, costs = larger(99_000)
    # A drop below 0 asks for more than any instance has: a finding without an instance.
    options = SearchOptions(
        max_drops_pp=(2.0, -60.0), protocol=protocol, folds=3, grid=Grid(num_image_thresholds=4, max_exits=2)
    )
    findings, instances = search_all(tables, costs, options)
    text = findings.to_json()
    json.loads(text, parse_constant=refuse)
    again = Findings.from_json(text)
    assert again.to_json() == text
    assert [one.name for one in findings.found if one.is_found] == [one.name for one in instances]
    assert [one.is_found for one in findings.found] == [True, True, False]
    assert [words.finding(one) for one in again.found] == [words.finding(one) for one in findings.found]
    assert words.finding(findings.found[-1]).startswith("drop--60pp: no instance ")
    assert bool(findings.judged) == (protocol == "cross_fitted")
    assert all((one.expected is not None) == (protocol == "cross_fitted") for one in instances)


def test_a_file_of_before_opens() -> None:
    """As version 0.2 wrote it: one protocol, sentences."""
    old = {
        "fronts": {"budgeted": [[1e9, 0.5]]},
        "names": ["max-miou"],
        "verdicts": ["max-miou: optimal"],
        "skipped": [],
    }
    findings = Findings.from_json(json.dumps(old))
    assert (findings.protocol, findings.found, findings.judged) == ("two_halves", [], [])
    assert (findings.names, findings.verdicts) == (["max-miou"], ["max-miou: optimal"])
    with pytest.raises(RunError, match="not what a search found"):
        Findings.from_json('{"fronts": 3}')
