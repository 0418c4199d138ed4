"""messnet: multi-exit semantic segmentation networks (MESS, Kouris et al., ECCV 2022).

net = messnet.convert(model, example_input, num_exits=6)
messnet.pretrain(net, images_and_masks, messnet.PretrainOptions(iterations=2000))
messnet.distill(net, images_and_masks, messnet.HeadSpace(), messnet.DistillOptions(iterations=1000))
tables, costs = messnet.evaluate(net, others), messnet.profile(net, input_size=(512, 512))
result = messnet.search(tables, costs, setting="input_dependent", minimise="macs", max_drop_pp=1.0)
session = messnet.Session(net, result.instance, input_size=(512, 512))
messnet.export(session, "mine.mess")
session = messnet.load("mine.mess")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from messnet.costs.latency import LatencyOptions
    from messnet.data.options import AugmentOptions
    from messnet.deployment.export import export
    from messnet.deployment.loading import load
    from messnet.deployment.quantising import EightBits
    from messnet.deployment.session import Result, Session
    from messnet.errors import MessError
    from messnet.images.preprocessing import Normalisation
    from messnet.network import zoo
    from messnet.network.head_space import HeadConfig, HeadSpace
    from messnet.network.multi_exit import MultiExitNet, convert
    from messnet.policy.options import EvaluationOptions
    from messnet.profiling import profile
    from messnet.records.costs import CostTable
    from messnet.records.exit_tables import ExitTables
    from messnet.records.instance import Exit, ExitChoice, Instance
    from messnet.run.calls import distill, evaluate, pretrain
    from messnet.searching.optima import search
    from messnet.training.options import ComputeOptions, DistillOptions, PretrainOptions

__all__ = [
    "AugmentOptions",
    "ComputeOptions",
    "CostTable",
    "DistillOptions",
    "EightBits",
    "EvaluationOptions",
    "Exit",
    "ExitChoice",
    "ExitTables",
    "HeadConfig",
    "HeadSpace",
    "Instance",
    "LatencyOptions",
    "MessError",
    "MultiExitNet",
    "Normalisation",
    "PretrainOptions",
    "Result",
    "Session",
    "convert",
    "distill",
    "evaluate",
    "export",
    "load",
    "pretrain",
    "profile",
    "search",
    "zoo",
]
__version__ = "0.2.0"

# Resolved when first used: the command's --help and a search should not wait for torch.
_HOMES = {
    "AugmentOptions": "messnet.data.options",
    "ComputeOptions": "messnet.training.options",
    "CostTable": "messnet.records.costs",
    "DistillOptions": "messnet.training.options",
    "EightBits": "messnet.deployment.quantising",
    "EvaluationOptions": "messnet.policy.options",
    "Exit": "messnet.records.instance",
    "ExitChoice": "messnet.records.instance",
    "ExitTables": "messnet.records.exit_tables",
    "HeadConfig": "messnet.network.head_space",
    "HeadSpace": "messnet.network.head_space",
    "Instance": "messnet.records.instance",
    "LatencyOptions": "messnet.costs.latency",
    "MessError": "messnet.errors",
    "MultiExitNet": "messnet.network.multi_exit",
    "Normalisation": "messnet.images.preprocessing",
    "PretrainOptions": "messnet.training.options",
    "Result": "messnet.deployment.session",
    "Session": "messnet.deployment.session",
    "convert": "messnet.network.multi_exit",
    "distill": "messnet.run.calls",
    "evaluate": "messnet.run.calls",
    "export": "messnet.deployment.export",
    "load": "messnet.deployment.loading",
    "pretrain": "messnet.run.calls",
    "profile": "messnet.profiling",
    "search": "messnet.searching.optima",
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
