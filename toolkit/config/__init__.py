"""The recipe: its schema, its reader, its command-line flags, and what is decided from it alone. Imports no torch."""
