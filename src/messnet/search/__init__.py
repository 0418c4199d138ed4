"""Exact search over validation tables and a cost table; needs no model."""

from messnet.search.engine import Front, FrontPoint, SearchResult, choose, pareto_front, search
from messnet.search.space import Grid, Objective, cost_of, route

__all__ = [
    "Front",
    "FrontPoint",
    "Grid",
    "Objective",
    "SearchResult",
    "choose",
    "cost_of",
    "pareto_front",
    "route",
    "search",
]
