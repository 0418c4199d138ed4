"""The declared grid of exits and thresholds that a search ranges over, and what an instance does on the tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.errors import RecipeError, RunError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance
from messnet.records.names import CostName


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The declared grid: which exits and thresholds a search tries. "Never exits here" is no threshold but a state of
    its own: the exit is left out of the instance."""

    max_exits: int = 3
    """Exits of an instance, the last one included; 1 to 3."""
    policy: str | None = None
    """One of ``tables.policies``; None: the first."""
    pixel_thresholds: tuple[float, ...] | None = None
    """Some of ``tables.pixel_thresholds``; None: all."""
    num_image_thresholds: int = 64
    """Image thresholds per exit and pixel threshold, >= 1: quantiles of the image confidences on the selection images.
    With at least as many as there are distinct values the grid is complete: no other threshold routes otherwise."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_exits <= 3:
            raise RecipeError(f"max_exits is {self.max_exits}: this search proves optima of 1 to 3 exits")
        if self.num_image_thresholds < 1:
            raise RecipeError(f"num_image_thresholds is {self.num_image_thresholds}, expected at least 1")

    def policy_of(self, tables: ExitTables) -> str:
        policy = self.policy or tables.policies[0]
        return tables.policies[_policy_index(tables, policy)]

    def pixel_thresholds_of(self, tables: ExitTables) -> list[int]:
        """Positions in ``tables.pixel_thresholds``."""
        if self.pixel_thresholds is None:
            return list(range(len(tables.pixel_thresholds)))
        return [_pixel_threshold_index(tables, value) for value in self.pixel_thresholds]


class Column(NamedTuple):
    """The image thresholds that are tried at one exit and one pixel threshold, and the images that reach them."""

    pixel_threshold: float
    image_thresholds: FloatArray
    """(levels,) ascending: the images that reach the one in force leave, so their sets are nested."""
    bins: NDArray[np.int32]
    """(V,): how many of these thresholds each image reaches."""


def columns_of(tables: ExitTables, position: int, grid: Grid) -> tuple[list[Column], int]:
    """Everything that the grid tries at ``tables.exits[position]``, and the number of its threshold pairs.

    Where several pixel thresholds route alike the first is kept. The image threshold that all images reach is left out:
    no image goes on then, and the instance that ends at this exit does the same at no higher cost.
    """
    policy = _policy_index(tables, grid.policy_of(tables))
    columns: list[Column] = []
    known: set[bytes] = set()
    num_declared = 0
    for t in grid.pixel_thresholds_of(tables):
        confidence = tables.image_confidence[:, position, policy, t]
        observed = np.unique(confidence)
        # A threshold between two observed values routes as the larger of them: no others need to be tried.
        chosen = observed
        if grid.num_image_thresholds < len(observed):
            # Quantiles: the thresholds are dense where the images are.
            ranks = np.linspace(0, len(confidence) - 1, grid.num_image_thresholds).round().astype(int)
            chosen = np.unique(np.sort(confidence)[ranks])
        num_declared += len(chosen)
        chosen = chosen[chosen > observed[0]]
        bins = np.searchsorted(chosen, confidence, side="right").astype(np.int32)
        # Pixel thresholds that route alike at every image threshold are one column.
        if len(chosen) and bins.tobytes() not in known:
            known.add(bins.tobytes())
            columns.append(Column(float(tables.pixel_thresholds[t]), image_thresholds(observed, chosen), bins))
    return columns, num_declared


def image_thresholds(observed: NDArray[np.float32], values: NDArray[np.float32]) -> FloatArray:
    """Image thresholds that the confidences ``values`` just reach and the next smaller ones ``observed`` (ascending) do
    not.

    Each lies midway between the two: as far as can be from the images that it must tell apart, on either side.
    """
    # Where each value stands among the observed ones, and the one below it.
    positions = np.searchsorted(observed, values)
    before = observed[np.maximum(positions - 1, 0)]
    # float32 is the tables' type: so no later cast moves a threshold onto an observed value.
    middle = ((before.astype(np.float64) + values) / 2).astype(np.float32)
    thresholds: FloatArray = np.where((positions > 0) & (middle > before), middle, values).astype(np.float64)
    return thresholds


def confidence_at(tables: ExitTables, choice: ExitChoice, policy: str) -> NDArray[np.float32]:
    """(V,) image confidence at an exit that decides, at its pixel threshold."""
    assert choice.pixel_threshold is not None
    threshold = _pixel_threshold_index(tables, choice.pixel_threshold)
    return tables.image_confidence[:, tables.exits.index(choice.exit), _policy_index(tables, policy), threshold]


def route(tables: ExitTables, instance: Instance) -> IntArray:
    """(V,) positions in ``tables.exits`` where the images leave: the first exit of the instance whose image confidence
    reaches its image threshold, else its last exit."""
    positions = _positions(tables, instance)
    routing = np.full(len(tables.image_names), positions[-1], np.int64)
    # From the deepest early exit up: a shallower exit overrides what lies behind it.
    for choice, position in reversed(list(zip(instance.exits[:-1], positions[:-1], strict=True))):
        if choice.pixel_threshold is not None and choice.image_threshold is not None:
            confidence = confidence_at(tables, choice, instance.policy)
            # In float64, as ``should_exit`` compares: a Python float would be rounded to the table's float32.
            routing[confidence >= np.float64(choice.image_threshold)] = position
    return routing


def cost_of(tables: ExitTables, costs: CostTable, instance: Instance, name: CostName = "macs") -> FloatArray:
    """(V,) cost of every image, see ``CostColumn.leaving``. Parameters and memory are those of everything the instance
    keeps, whichever exit the image takes."""
    positions = _positions(tables, instance)
    # What leaving costs at each exit of the instance, looked up by the exit where each image leaves.
    leaving = costs.column(name, [choice.exit for choice in instance.exits]).leaving()
    return np.array(leaving[[positions.index(int(position)) for position in route(tables, instance)]], np.float64)


def _positions(tables: ExitTables, instance: Instance) -> list[int]:
    missing = [choice.exit for choice in instance.exits if choice.exit not in tables.exits]
    if missing:
        raise RunError(f"the exit tables have no {missing[0]}: the instance was made for another head space")
    return [tables.exits.index(choice.exit) for choice in instance.exits]


def _policy_index(tables: ExitTables, policy: str) -> int:
    if policy not in tables.policies:
        raise RecipeError(f"the exit tables have no policy {policy!r}: expected one of {', '.join(tables.policies)}")
    return tables.policies.index(policy)


def _pixel_threshold_index(tables: ExitTables, value: float) -> int:
    matches = np.flatnonzero(np.isclose(tables.pixel_thresholds, value, rtol=0, atol=1e-9))
    if not len(matches):
        known = ", ".join(f"{threshold:g}" for threshold in tables.pixel_thresholds)
        raise RecipeError(f"the exit tables have no pixel threshold {value:g}: expected one of {known}")
    return int(matches[0])
