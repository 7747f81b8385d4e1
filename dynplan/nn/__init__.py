"""Modules over the ops."""
