"""Checkpoints: what is in one, how it is committed, verified, found again and loaded into any engine."""
