"""What must be computed and kept: parameters, ops, collectives, memory, routing load."""
