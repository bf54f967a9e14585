"""Costs: seconds and bytes of captured stages."""
