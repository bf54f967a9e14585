"""Train a ResNet on scikit-learn's handwritten digits under a memory budget, to over 95 % test accuracy.

python examples/train_digits.py --share 0.4
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import ResNetConfig, ResNetForImageClassification

from rematplan import InfeasibleBudget, execute, format_bytes, measure_peak, solve


def main() -> None:
    """Plan for a share of the activation bytes, train, test."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.4, help="of the plain step's activation bytes")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    console = Console()

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    train_x, test_x, train_y, test_y = (
        t.to(arguments.device)
        for t in train_test_split(
            pixels, torch.tensor(labels), test_size=0.25, random_state=0, stratify=labels
        )
    )
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic"
    )
    config.num_labels = 10
    model = ResNetForImageClassification(config).to(arguments.device).train()
    # The stem of a ResNet shrinks images four times; digits of 8 x 8 are enlarged first.
    enlarge = torch.nn.Upsample(scale_factor=4, mode="nearest")
    train_x, test_x = enlarge(train_x), enlarge(test_x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    size = min(arguments.batch, len(train_x))
    sample = {"pixel_values": train_x[:size], "labels": train_y[:size]}

    keep_all = solve(model, 2**50, sample=sample, optimizer=optimizer)
    budget = keep_all.chain.fixed + int(arguments.share * (keep_all.plain.peak - keep_all.chain.fixed))
    try:
        plan = solve(model, budget, sample=sample, optimizer=optimizer)
    except InfeasibleBudget as error:
        console.print(f"{error} Going on with that.")
        plan = solve(model, error.smallest, sample=sample, optimizer=optimizer)
    print(plan)
    planned = execute(plan, model)

    peak = 0
    loss = torch.tensor(0.0)
    for epoch in track(range(arguments.epochs), description="training", console=console):
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(epoch))
        # A plan is for one shape: the last, smaller batch of an epoch is left out.
        for start in range(0, len(order) - size + 1, size):
            picked = order[start : start + size].to(arguments.device)
            batch = {"pixel_values": train_x[picked], "labels": train_y[picked]}

            def step(batch: dict[str, torch.Tensor] = batch) -> torch.Tensor:
                output = planned(**batch)
                output.loss.backward()
                return output.loss.detach()

            if epoch == 1 and start == 0:
                # Counted with an optimizer whose state exists, as in every step but the first.
                measured = measure_peak(step, resident=[planned, batch, optimizer])
                peak, loss = measured.peak, measured.result
            else:
                loss = step()
            optimizer.step()
            optimizer.zero_grad()

    planned.eval()
    with torch.no_grad():
        accuracy = (planned(pixel_values=test_x).logits.argmax(-1) == test_y).float().mean().item()
    console.print(
        f"last loss {loss.item():.4f}, test accuracy {accuracy:.2%}; budget {format_bytes(plan.memory_budget)}, "
        f"predicted peak {format_bytes(plan.predicted_peak)}, measured {format_bytes(peak)}, plain "
        f"{format_bytes(plan.plain.peak)}"
    )
    if accuracy <= 0.95 or peak > plan.memory_budget:
        raise SystemExit("below 95 % accuracy, or over the budget")


if __name__ == "__main__":
    main()
