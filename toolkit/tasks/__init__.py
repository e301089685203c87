"""Tasks: how the columns of a row become a question, its contexts and an answer. Imports no torch."""
