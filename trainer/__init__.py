"""What needs JAX: running a job for real (to come), and reading what the compiler makes of it."""
