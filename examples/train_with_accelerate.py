"""Train a GPT-2 with accelerate under a memory budget, in full or in mixed precision.

python examples/train_with_accelerate.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from rematplan import execute, solve


def train(
    budget: str | None = "1.5MiB",
    mixed_precision: str = "bf16",
    save: str | None = None,
    resume: str | None = None,
) -> tuple[list[float], torch.nn.Module]:
    """Losses of two epochs and the model; plainly where there is no budget.

    Args:
        save: folder for the state between the epochs.
        resume: folder with such a state; the second epoch alone is trained.
    """
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model: torch.nn.Module = GPT2LMHeadModel(
        GPT2Config(
            n_layer=3, n_embd=32, n_head=2, vocab_size=256, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    data = torch.randint(0, 256, (32, 32))

    if budget is not None:
        for (
            parameter
        ) in model.parameters():  # accumulation: they exist when the second batch comes, and count
            parameter.grad = torch.zeros_like(parameter)
        # prepare() will wrap the forward in autocast: plan in the same context, and execute before prepare().
        with accelerator.autocast():
            sample = {"input_ids": data[:4], "labels": data[:4]}
            plan = solve(model, budget, sample=sample, optimizer=optimizer)
        print(plan)
        model.zero_grad()
        model = execute(plan, model)

    batches = DataLoader(TensorDataset(data), batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, batches, scheduler)
    if resume is not None:
        accelerator.load_state(resume)
    losses = []
    for epoch in range(0 if resume is None else 1, 2):
        if epoch == 1 and save is not None:
            accelerator.save_state(save)
        for (ids,) in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses, accelerator.unwrap_model(model)


if __name__ == "__main__":
    print(train()[0])
