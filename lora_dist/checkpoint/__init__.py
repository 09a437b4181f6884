"""What a run leaves behind: the adapter in PEFT's format, and the whole training state to resume from."""
