"""Sampling methods."""
