"""How long one op takes alone on one chip."""
