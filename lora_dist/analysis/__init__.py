"""What trained adapters have learnt (section 7 of the paper), in plain torch."""
