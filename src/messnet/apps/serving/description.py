"""The description of the model that /v1/info gives."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from messnet.deployment.session import Session


class ExitInfo(TypedDict):
    exit_index: int
    head: str
    pixel_threshold: float | None
    image_threshold: float | None
    latency_ms: NotRequired[float]
    """The time of an image that leaves here, where that was measured on this device."""
    macs: NotRequired[int]
    """Multiply-accumulates of an image that leaves here."""
    share_of_original: NotRequired[float]
    """``macs`` over those of the original model."""
    warm_up_latency_ms: NotRequired[float]
    """The time that this process's second call took."""


class WorkloadInfo(TypedDict, total=False):
    input_size: list[int]
    """height, width"""
    original_macs: int
    missing: str
    """Why there is no table."""


class ModelInfo(TypedDict, total=False):
    exits: list[ExitInfo]
    latency_conditions: object
    workload: WorkloadInfo


def describe(session: Session) -> ModelInfo:
    """The exits of a session with their thresholds and costs; without a table of costs why there is none.
    Nothing tells where the files lie: anyone may read it."""
    chosen = [choice.exit for choice in session.instance.exits]
    exits: list[ExitInfo] = [
        {
            "exit_index": choice.exit_index,
            "head": choice.head,
            "pixel_threshold": choice.pixel_threshold,
            "image_threshold": choice.image_threshold,
        }
        for choice in session.instance.exits
    ]
    record: ModelInfo = {"exits": exits}
    if session.costs is not None:
        times = session.costs.column("latency_ms", chosen).leaving().tolist()
        for entry, latency_ms in zip(exits, times, strict=True):
            entry["latency_ms"] = round(latency_ms, 3)
        record["latency_conditions"] = session.costs.conditions
    costs = session.workload
    if costs is None:
        record["workload"] = {"missing": "the model comes without a table of its parts' multiply-accumulates"}
        return record
    macs, total = costs.column("macs", chosen).leaving(), costs.total_macs()
    for entry, value in zip(exits, macs.tolist(), strict=True):
        entry["macs"] = round(value)
        entry["share_of_original"] = round(value / total, 4)
    record["workload"] = {"input_size": list(costs.input_size), "original_macs": round(total)}
    return record
