"""Runs a job for real, in JAX. Empty so far: the trainer is the next stage of the project."""
