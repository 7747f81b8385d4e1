"""Hugging Face encoders under a dynplan policy; :mod:`.swap` is the way in."""
