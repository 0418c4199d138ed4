"""Both training stages on one loop (docs/method.md#training).

Stage 1, ``pretrain``: the backbone and the final head learn, by default with one early exit active at a time.
Stage 2, ``distill``: both frozen, every head of the overprovisioned network learns from the final exit, independently.

Iteration j draws its images, augmentation and dropout from (seed, j) alone, so that training resumed from a checkpoint
goes on exactly as it would have.
"""
