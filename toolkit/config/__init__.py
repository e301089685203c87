"""What a run is: the recipe's schema, how it is read, and its command-line flags. Imports no torch."""
