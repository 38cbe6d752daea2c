"""Tables of measurements, and how their rows become jobs."""
