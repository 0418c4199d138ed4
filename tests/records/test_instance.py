"""Instances: round trips and bad files."""

from __future__ import annotations

import json

import pytest

from messnet.errors import RunError
from messnet.records.instance import Exit, ExitChoice, Instance

INSTANCE = Instance(
    name="fast",
    setting="input_dependent",
    exits=(
        ExitChoice(exit_index=1, head="r2b1fcn", pixel_threshold=0.9, image_threshold=0.123456789012345678),
        ExitChoice(exit_index=5, head="final"),
    ),
    objective="least macs",
    selected_on={"miou": 0.6, "macs": 1e9},
    certificate="optimal",
)


def test_reads_its_own_json() -> None:
    assert Instance.from_json(INSTANCE.to_json()) == INSTANCE
    assert INSTANCE.exits[0].exit == Exit(1, "r2b1fcn")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"schema_version": 1}', '{"schema_version": 1, "exits": 3}'])
def test_bad_files(text: str) -> None:
    with pytest.raises(RunError, match="messnet search"):
        Instance.from_json(text)


def test_another_schema_version() -> None:
    record = json.loads(INSTANCE.to_json()) | {"schema_version": 2}
    with pytest.raises(RunError, match="schema version 2"):
        Instance.from_json(json.dumps(record))
