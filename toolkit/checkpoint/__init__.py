"""Checkpoints: what is in one, how it is committed, verified and found again, and how it is laid into any engine."""
