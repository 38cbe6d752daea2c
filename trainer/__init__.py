"""What needs JAX: running a job for real (docs/trainer.md), and reading what the compiler makes of it."""
