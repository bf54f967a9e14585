"""What a machine with one GPU is asked in one command: ``make cuda``, or ``python -m benchmarks.cuda``.

Each check is a process of its own with a time limit, so that one that crashes or hangs costs no other; what
it finds is written as it is found. Only what the planner itself needs, and transformers, is imported; nothing
is installed.
"""
