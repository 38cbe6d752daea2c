"""Readers of what others have: profiles, logs and tables, into rows of the one measurement table."""
