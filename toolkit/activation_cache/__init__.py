"""The frozen prefix's output, computed once for every sample and kept on disk."""
