"""Fitting dynplan into models and trainers people already have."""
