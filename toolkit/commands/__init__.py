"""The command lines: one module a verb."""
