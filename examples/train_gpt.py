"""Train a character-level GPT-2 plainly, and by plans at 50 %, 35 % and 25 % of its activation bytes.

The text is the one that ships with Python itself (pydoc_data.topics). All four models start from the same
weights and see the same batches and the same dropout; their losses must be equal bit for bit. Their steps
are interleaved, so that the times can be compared.

    python examples/train_gpt.py --steps 30
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from rematplan import InfeasibleBudget, Plan, execute, measure_peak, solve

FRACTIONS = (0.50, 0.35, 0.25)


def text_batches(context: int, batch: int, steps: int) -> tuple[list[torch.Tensor], int]:
    """``steps`` batches of shape (batch, context), and the number of different characters."""
    text = "\n".join(topics.values())
    characters = sorted(set(text))
    index = {c: i for i, c in enumerate(characters)}
    data = torch.tensor([index[c] for c in text])
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(data) - context, (steps, batch), generator=generator)
    return [torch.stack([data[s : s + context] for s in row]) for row in starts], len(characters)


def build(characters: int, arguments: argparse.Namespace) -> GPT2LMHeadModel:
    """A small GPT-2 with dropout, in train mode."""
    config = GPT2Config(
        vocab_size=characters,
        n_positions=arguments.context,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).to(arguments.device).train()


def plans(
    model: GPT2LMHeadModel, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, console: Console
) -> list[tuple[str, Plan]]:
    """One plan per fraction of the activation bytes; where none fits, the smallest that does."""
    keep_all = solve(model, 2**50, sample=batch, optimizer=optimizer)
    activations = keep_all.plain.peak - keep_all.chain.fixed
    found = []
    for fraction in FRACTIONS:
        budget = keep_all.chain.fixed + int(fraction * activations)
        name = f"{fraction:.0%}"
        try:
            plan = keep_all.within(budget)
        except InfeasibleBudget as error:
            console.print(f"{name} of the activations: {error}")
            plan = keep_all.within(error.smallest)
            name = f"{(error.smallest - keep_all.chain.fixed) / activations:.0%} (smallest)"
        found.append((name, plan))
    return found


def main() -> None:
    """Plan, train, and print what was predicted beside what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    console = Console()

    batches, characters = text_batches(arguments.context, arguments.batch, arguments.steps)
    batches = [b.to(arguments.device) for b in batches]
    sample = {"input_ids": batches[0], "labels": batches[0]}
    model = build(characters, arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with console.status("planning"):
        chosen = plans(model, sample, optimizer, console)
    console.print(f"The plan for {chosen[1][0]} of the activation bytes:\n")
    print(chosen[1][1])

    names = ["plain", *(name for name, _ in chosen)]
    base = [copy.deepcopy(model) for _ in names]
    models = [base[0], *(execute(plan, own) for (_, plan), own in zip(chosen, base[1:], strict=True))]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models]
    losses: list[list[float]] = [[] for _ in models]
    seconds: list[list[float]] = [[] for _ in models]
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=arguments.steps * len(models))
        for number, ids in enumerate(batches):
            for i, (each, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                torch.manual_seed(number)
                began = time.perf_counter()
                loss = each(input_ids=ids, labels=ids).loss
                loss.backward()
                losses[i].append(loss.item())
                seconds[i].append(time.perf_counter() - began)
                optimizer.step()
                optimizer.zero_grad()
                progress.advance(task)

    def step(each: torch.nn.Module) -> torch.Tensor:
        output = each(**sample)
        output.loss.backward()
        return output

    table = Table(title="GPT-2 on pydoc_data.topics; bytes in MiB; predicted / measured")
    for heading in ("activations", "first loss", "last loss", "budget", "peak", "overhead"):
        table.add_column(heading, justify="right")
    plain_time = statistics.median(seconds[0])
    for i, name in enumerate(names):
        peak = measure_peak(
            functools.partial(step, models[i]), resident=[models[i], sample, optimizers[i]]
        ).peak
        optimizers[i].zero_grad()
        plan = chosen[i - 1][1] if i else None
        predicted = plan.predicted_peak if plan else chosen[0][1].plain.peak
        slower = statistics.median(seconds[i]) / plain_time - 1
        table.add_row(
            name,
            f"{losses[i][0]:.6f}",
            f"{losses[i][-1]:.6f}",
            f"{plan.memory_budget / 2**20:.2f}" if plan else "",
            f"{predicted / 2**20:.2f} / {peak / 2**20:.2f}",
            f"{plan.predicted_overhead:.1%} / {slower:.1%}" if plan else "",
        )
    console.print(table)
    equal = all(run == losses[0] for run in losses)
    console.print(f"losses of all {arguments.steps} steps equal bit for bit: {'yes' if equal else 'NO'}")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
