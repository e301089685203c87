"""Engines that execute an optimizer step: torch alone, or DeepSpeed ZeRO, behind one small interface."""
