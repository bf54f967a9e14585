"""Claim: compiled stages train architectures of all families bit for bit like themselves all kept.

Twenty of the architectures of ``coverage.py``, each in a process of its own, at the smallest budget and one
halfway to the plain step's peak, against the compiled plan that keeps everything.
"""

from __future__ import annotations

import torch

from benchmarks.coverage import cells, isolated

NAMES = (
    "GPT-2", "Llama", "Mistral", "Gemma", "OPT", "BERT", "RoBERTa", "DistilBERT", "ModernBERT", "T5", "BART",
    "ViT", "Swin", "ConvNeXt", "ResNet", "CLIP", "Wav2Vec2", "UNet2DConditionModel", "DiT", "Mixtral",
)  # fmt: skip # rows


def report() -> str:
    """Return the table, as Markdown."""
    rows = [isolated(name, "inductor") for name in NAMES]
    verdicts = [row.verdict for row in rows]
    equal, refused, wrong = (verdicts.count(v) for v in ("equal", "refused", "wrong"))
    heads = ["model", "result", "capture", "stages", "smallest", "used", "s", "why"]
    return "\n".join(
        (
            "# Which models can be planned compiled",
            "",
            f"{len(rows)} architectures in small random configurations, on a CPU with torch {torch.__version__}, by",
            '`solve(backend="inductor")`. Columns as in [coverage.md](coverage.md), but `equal` means: bit for bit the',
            "compiled plan that keeps everything, and within the budget.",
            "",
            f"**{equal} equal, {refused} refused, {wrong} wrong.**",
            "",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
            *(f"| {' | '.join(cells(row))} |" for row in rows),
        )
    )
