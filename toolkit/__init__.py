"""Frostline: partial fine-tuning of causal language models where cost follows the trained suffix."""

__version__ = "0.1.0"
