"""Load any causal language model and know its parts: embeddings, blocks, final norm, head."""
