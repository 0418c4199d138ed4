"""How torch's threads wait, as the command sets it before torch is imported."""

import os
import platform
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


FAULTS = """
import resource, sys
import torch
from messnet.costs.processor import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    for _ in range(8):
        torch.full((2**24,), 1.0)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
begin = faults()
print(faults() - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is spoken to")
def test_freed_memory_is_kept() -> None:
    """Counted by the system: pages that it hands out anew."""
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("give back", "keep")
    )
    assert given_back > 8  # pages are of 4 KiB or, where the system has huge ones, of 2 MiB
    assert kept < given_back / 8
