"""Train a character-level GPT-2 with transformers' Trainer under a memory budget.

Dropout, gradient accumulation, clipping, a learning-rate schedule and checkpoints are the Trainer's own.

    python examples/train_with_trainer.py
"""

from __future__ import annotations

import tempfile
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

from rematplan import execute, solve

CONTEXT, BATCH = 32, 4


def train(output: str, budget: str | None = "1.6MiB", resume: str | None = None) -> Trainer:
    """Train for eight steps: plainly without a budget, from a checkpoint's folder on if one is given."""
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    data = [{"input_ids": ids, "labels": ids} for ids in text[: CONTEXT * 66].split(CONTEXT)]
    torch.manual_seed(0)
    model: torch.nn.Module = GPT2LMHeadModel(
        GPT2Config(
            n_layer=3,
            n_embd=32,
            n_head=2,
            vocab_size=256,
            n_positions=CONTEXT,
            bos_token_id=0,
            eos_token_id=0,
        )
    )

    if budget is not None:
        model.train()
        for (
            parameter
        ) in model.parameters():  # accumulation: they exist when the second batch comes, and count
            parameter.grad = torch.zeros_like(parameter)
        # What the Trainer passes: a batch, and how many labels all accumulated batches have together.
        sample = {**default_data_collator(data[:BATCH]), "num_items_in_batch": torch.tensor(1.0)}
        plan = solve(model, budget, sample=sample, optimizer=torch.optim.AdamW(model.parameters()))
        print(plan)
        model.zero_grad()
        model = execute(plan, model)

    arguments = TrainingArguments(
        output,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=1e-3,
        warmup_steps=2,
        num_train_epochs=1,  # its last, smaller batch is planned for when it comes
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(folder)
        print(type(GPT2LMHeadModel.from_pretrained(folder)))
