"""One process of a job executed on fake tensors: what it will hold, compute and send, before a GPU is booked."""
