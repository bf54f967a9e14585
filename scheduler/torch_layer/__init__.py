"""The layer on torch that capture, costs and executors stand on: calls, state, devices, private names."""
