"""What a run did: time, memory, bytes, collectives, FLOPs, and the sinks and reports that show them."""
