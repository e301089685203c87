"""The layer mask: selectors resolved to exact tensors, the frost line, and the audit table."""
