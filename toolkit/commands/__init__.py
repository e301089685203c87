"""The command lines: one module a verb, with its parser and the function that ``import toolkit`` offers."""
