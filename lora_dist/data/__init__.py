"""Examples, label masks, packing, and the resumable loader."""
