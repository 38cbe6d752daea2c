"""The discrete-event engine: stages run their schedule, collectives share links, and a timeline results."""
