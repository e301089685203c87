"""What a run will cost, from its recipe alone: memory by kind, floating-point operations and disk. No weights are read.

One training step is rehearsed on the meta device by the code that trains: tensors without content go through the same
split, the same blocks, the same loss and autograd, and a ledger notes each allocation, its end, and each product.
"""
