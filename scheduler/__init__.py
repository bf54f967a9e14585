"""Scheduler: decide what a training step keeps and what it recomputes."""
