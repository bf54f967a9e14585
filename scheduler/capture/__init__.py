"""Capture: a model as stages that run in a line."""
