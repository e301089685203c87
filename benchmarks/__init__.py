"""One script per claim; each prints one table and can be run from a checkout."""
