"""List the checks in the order in which they run: the most basic first."""

from __future__ import annotations

from benchmarks.cuda.runner import Check

__all__ = ["CHECKS", "SECONDS"]

SECONDS = 480.0  # for all of them
# cuBLAS is deterministic only with workspaces of a fixed size, which are read when CUDA starts; those of
# Hopper have this size anyway.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}

BYTES = "benchmarks.cuda.account"
BITS = "benchmarks.cuda.equality"
COPIES = "benchmarks.cuda.copies"
TIMES = "benchmarks.cuda.step_times"
COMPILED = "benchmarks.cuda.compiled"

CHECKS = (
    Check("environment", BYTES, 90),
    Check("workspaces", BYTES, 30),
    Check("attention_backends", BITS, 30),
    Check("equality", BITS, 60),
    Check("autocast_equality", BITS, 45),
    Check("determinism", BITS, 60),
    Check("determinism_asked_for", BITS, 60, DETERMINISTIC),
    Check("peaks", BYTES, 60, DETERMINISTIC),
    Check("expandable_peaks", BYTES, 60, {**DETERMINISTIC, **EXPANDABLE}),
    Check("values", BITS, 40, DETERMINISTIC),
    Check("rehearse_without_data", BYTES, 40, DETERMINISTIC),
    Check("rehearse_real", BYTES, 40, DETERMINISTIC),
    Check("optimizer", BYTES, 30),
    Check("copies", COPIES, 60),
    Check("convolutions", BITS, 50),
    Check("lstm_dropout", BITS, 30),
    Check("overhead", TIMES, 75),
    Check("gpt2", TIMES, 90),
    Check("llama", TIMES, 90),
    Check("resnet", TIMES, 75),
    Check("gpt2_compiled", COMPILED, 90),
    Check("llama_compiled", COMPILED, 90),
    Check("resnet_compiled", COMPILED, 90),
)
