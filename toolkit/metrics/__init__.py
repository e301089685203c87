"""Metrics as functions of sums over rows, so that one bootstrap gives all of them their intervals."""
