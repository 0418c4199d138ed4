"""Exact search over validation tables and cost tables, and a promise on what it finds; needs no model and no torch.

``objective`` and ``grid`` say what can be asked for and what is tried, ``optima`` and ``anytime`` find the answer,
``exact`` proves it, ``guarantee`` certifies it on images not seen, ``answers`` holds the records and ``words`` their
English.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from messnet.searching.answers import FrontPoint, SearchResult, SearchSetting
    from messnet.searching.grid import Grid, cost_of, route
    from messnet.searching.guarantee import certify
    from messnet.searching.measure import CostMeasure
    from messnet.searching.objective import AnytimeObjective, Guarantee, Limit, Objective
    from messnet.searching.optima import Front, choose, pareto_front, search, search_for

__all__ = [
    "AnytimeObjective",
    "CostMeasure",
    "Front",
    "FrontPoint",
    "Grid",
    "Guarantee",
    "Limit",
    "Objective",
    "SearchResult",
    "SearchSetting",
    "certify",
    "choose",
    "cost_of",
    "pareto_front",
    "route",
    "search",
    "search_for",
]

# Resolved when first used: a recipe reads a Grid, the command an Objective, and neither should wait for numba.
_HOMES = {
    "answers": ("FrontPoint", "SearchResult", "SearchSetting"),
    "grid": ("Grid", "cost_of", "route"),
    "guarantee": ("certify",),
    "measure": ("CostMeasure",),
    "objective": ("AnytimeObjective", "Guarantee", "Limit", "Objective"),
    "optima": ("Front", "choose", "pareto_front", "search", "search_for"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
