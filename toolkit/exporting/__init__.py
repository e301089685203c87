"""Export a run: a model directory for transformers, or a delta."""
