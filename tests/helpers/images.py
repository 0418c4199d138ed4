"""Images without a file."""

from __future__ import annotations

import numpy as np


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: coloured blocks with noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
    return np.clip(blocks[:height, :width] + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
