"""Exact search over validation tables and a cost table, and a promise on what it finds; needs no model."""

from messnet.search.engine import Front, FrontPoint, SearchResult, choose, pareto_front, search
from messnet.search.guarantee import Guarantee, certify
from messnet.search.space import Grid, Objective, cost_of, route

__all__ = [
    "Front",
    "FrontPoint",
    "Grid",
    "Guarantee",
    "Objective",
    "SearchResult",
    "certify",
    "choose",
    "cost_of",
    "pareto_front",
    "route",
    "search",
]
