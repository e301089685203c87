"""Retrieval: texts of a dictionary or a corpus, and the index that finds them. Imports no torch."""
