"""The exit policy for dense predictions, and labels from logits."""
