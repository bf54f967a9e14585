"""Benchmarks: each module checks one claim, and prints a table. `python -m benchmarks NAME`."""
