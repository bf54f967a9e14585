"""Core: chains, schedules and the referee that judges them, as inert data; no torch."""
