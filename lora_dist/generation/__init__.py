"""Decoding in plain torch: greedy, drawn, beam search. It knows no model but through `decode.IncrementalModel`."""
