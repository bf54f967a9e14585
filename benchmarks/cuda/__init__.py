"""Check and measure everything on a machine with one GPU: ``make cuda`` or ``python -m benchmarks.cuda``.

Each check is a process with a time limit, so that one that crashes or hangs costs no other, and writes its
findings as it makes them. Only the planner's dependencies and transformers are imported, none installed.
"""
