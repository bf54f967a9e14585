"""Capture by blocks: stages are calls of whole modules, or callables."""
