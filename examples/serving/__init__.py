"""A small server whose budget follows its queue, and a load test of it."""
