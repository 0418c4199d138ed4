"""Pixels in and out, the same in training and deployment."""
