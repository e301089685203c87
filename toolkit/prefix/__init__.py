"""The frozen prefix: cut the model at the frost line and run the part below it without gradients."""
