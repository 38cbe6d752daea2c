"""What is asked: the job, its model presets, and the rules between its fields."""
