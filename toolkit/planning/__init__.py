"""Memory by kind, floating-point operations and disk of a run, from its recipe alone. No weights are read.

One training step is traced on the meta device by the code that trains: tensors without content go through the same
split, the same blocks, the same loss and autograd, and a log notes each allocation, its end, and each matrix product.
"""
