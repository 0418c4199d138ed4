"""How torch's threads wait, as the command sets it before torch is imported."""

import os
import subprocess
import sys

import pytest

SHOWN = """
import os, sys
from messnet.__main__ import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000 None"),
        ({"GOMP_SPINCOUNT": "77"}, "77 None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE"),
    ],
    ids=str,
)
def test_the_command_lets_threads_sleep_unless_the_user_said_otherwise(given: dict[str, str], expected: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", SHOWN, "--help"]
    run = subprocess.run(command, env=kept | given, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == expected
