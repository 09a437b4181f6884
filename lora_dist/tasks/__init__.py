"""Tasks: what a model's output is held against, and with which metric."""
