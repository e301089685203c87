"""AdamW with float32 masters or low-bit state, its parameter groups and its schedule: one package for both engines."""
