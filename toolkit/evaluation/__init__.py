"""Compare models on rows that none of them was trained on, beside what trivial answers score."""
