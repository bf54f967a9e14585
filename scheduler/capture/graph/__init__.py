"""Capture by torch.export: stages are slices of an op graph."""
