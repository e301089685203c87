"""A training run: set-up, the step, the loop."""
