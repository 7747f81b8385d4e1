"""Whole programs that use dynplan, each in a folder of its own."""
