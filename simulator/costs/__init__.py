"""Work priced on hardware: seconds of pieces, reductions, updates; both drivers, formulas and events, start here."""
