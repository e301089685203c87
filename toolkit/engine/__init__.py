"""What drives one optimizer step: torch alone, or DeepSpeed ZeRO, behind one small interface."""
