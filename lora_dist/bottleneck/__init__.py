"""Adapters that are layers of their own, in plain torch: what they are, how many parameters, what they compute."""
