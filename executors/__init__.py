"""Executors: train a PyTorch model by a plan."""
