"""Pages and figures from results; nothing is computed here that the simulator should know."""
