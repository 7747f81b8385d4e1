"""Semantic segmentation with plain cross-entropy and with dynplan's region loss, at equal settings."""
