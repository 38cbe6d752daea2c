"""Many plans at once: the closed form over columns, spaces of plans, search, and why not."""
