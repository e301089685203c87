"""Cut the model at the frost line into a frozen prefix and a trained suffix with its loss."""
