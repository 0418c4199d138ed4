"""messnet: multi-exit semantic segmentation networks (MESS, Kouris et al., ECCV 2022).

net = messnet.convert(model, example_input, num_exits=6)
costs = messnet.profile(net, input_size=(512, 512))
result = messnet.search(tables, costs, setting="input_dependent", minimise="macs", max_drop_pp=1.0)
session = messnet.load("runs/demo")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from messnet.costs.latency import LatencyOptions
    from messnet.deployment.loading import load
    from messnet.deployment.session import Result, Session
    from messnet.errors import MessError
    from messnet.network import zoo
    from messnet.network.exit_head import HeadConfig, HeadSpace
    from messnet.network.multi_exit import MultiExitNet, convert
    from messnet.profiling import profile
    from messnet.records.costs import CostTable
    from messnet.records.exit_tables import ExitTables
    from messnet.records.instance import Exit, ExitChoice, Instance
    from messnet.searching import search

__all__ = [
    "CostTable",
    "Exit",
    "ExitChoice",
    "ExitTables",
    "HeadConfig",
    "HeadSpace",
    "Instance",
    "LatencyOptions",
    "MessError",
    "MultiExitNet",
    "Result",
    "Session",
    "convert",
    "load",
    "profile",
    "search",
    "zoo",
]
__version__ = "0.2.0"

# Resolved when first used: the command's --help and a search should not wait for torch.
_HOMES = {
    "CostTable": "messnet.records.costs",
    "Exit": "messnet.records.instance",
    "ExitChoice": "messnet.records.instance",
    "ExitTables": "messnet.records.exit_tables",
    "HeadConfig": "messnet.network.exit_head",
    "HeadSpace": "messnet.network.exit_head",
    "Instance": "messnet.records.instance",
    "LatencyOptions": "messnet.costs.latency",
    "MessError": "messnet.errors",
    "MultiExitNet": "messnet.network.multi_exit",
    "Result": "messnet.deployment.session",
    "Session": "messnet.deployment.session",
    "convert": "messnet.network.multi_exit",
    "load": "messnet.deployment.loading",
    "profile": "messnet.profiling",
    "search": "messnet.searching",
    "zoo": "messnet.network.zoo",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'messnet' has no attribute {name!r}")
    from messnet.errors import needing_extras

    with needing_extras():
        module = importlib.import_module(_HOMES[name])
    return module if name == "zoo" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
