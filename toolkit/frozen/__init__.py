"""Weights that are not trained: quantised, offloaded, fetched block by block."""
