"""Predicts what a job costs. Pure Python and NumPy; no JAX."""
