"""Open a trained model, let it answer, and measure its loss."""
