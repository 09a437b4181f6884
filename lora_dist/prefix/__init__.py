"""Trained vectors in the place of tokens, in plain torch: where they stand, how many there are, what they do."""
