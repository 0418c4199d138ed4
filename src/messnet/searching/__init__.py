"""Exact search over validation tables and a cost table, and a promise on what it finds; needs no model."""

from messnet.searching.anytime import AnytimeObjective
from messnet.searching.guarantee import Guarantee, certify
from messnet.searching.results import Front, FrontPoint, SearchResult, choose, pareto_front, search, search_for
from messnet.searching.space import Grid, Limit, Objective, cost_of, route

__all__ = [
    "AnytimeObjective",
    "Front",
    "FrontPoint",
    "Grid",
    "Guarantee",
    "Limit",
    "Objective",
    "SearchResult",
    "certify",
    "choose",
    "cost_of",
    "pareto_front",
    "route",
    "search",
    "search_for",
]
