"""Several runs of one recipe that differ in some keys: which, one after the other, and what each gave for what."""
