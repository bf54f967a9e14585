"""Plans: a chain, its schedule and where both come from; files, tables and timelines of them; no torch."""
