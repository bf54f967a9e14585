"""Meters: seconds and bytes of running code, on the CPU, on CUDA, and of simulated allocators."""
