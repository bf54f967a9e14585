"""Bounds: seconds that no plan of a graph of ops can beat; no torch."""
