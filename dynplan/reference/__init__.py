"""Short eager PyTorch: the specification of every op, its test oracle and its bench baseline."""
