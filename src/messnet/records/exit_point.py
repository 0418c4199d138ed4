"""Where a model may exit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """A place in the model where a feature map (N, ``channels``, h, w) can be tapped."""

    node: str
    """Name of the traced node whose output is tapped; identifies the place."""
    module: str
    """The module whose output it is, in the user's names."""
    channels: int
    output_stride: int
    """Input pixels per feature pixel."""
    dilation: int
    """The dilation of the backbone's last spatial convolution before this point."""
    macs: float
    """Workload of the backbone up to here, at the example input's size."""
    latency_ms: float | None = None
    """Time of the backbone up to here, where exits are placed by latency."""
