"""The engine on DeepSpeed ZeRO, its configuration and its optimizers."""
