"""messnet: multi-exit semantic segmentation networks (MESS, Kouris et al., ECCV 2022)."""

__version__ = "0.1.0"
