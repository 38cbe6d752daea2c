"""From work and hardware to a forecast."""
