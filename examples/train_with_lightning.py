"""Train a LightningModule under a memory budget, by a callback.

python examples/train_with_lightning.py
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from rematplan import Rematerialize


class LanguageModel(LightningModule):
    """A GPT-2; nothing here knows of plans."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(
            GPT2Config(
                n_layer=3, n_embd=32, n_head=2, vocab_size=256, n_positions=32, bos_token_id=0, eos_token_id=0
            )
        )
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        (ids,) = batch
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        (ids,) = batch
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(
    budget: str | None = "1.5MiB", precision: str = "32-true", folder: str | None = None
) -> LanguageModel:
    """Two epochs; plainly where there is no budget; a checkpoint in the folder, if one is given."""
    seed_everything(0, verbose=False)
    model = LanguageModel()
    trainer = Trainer(
        callbacks=[] if budget is None else [Rematerialize(memory_budget=budget)],
        max_epochs=2,
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type] # one of the names that Lightning lists
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randint(0, 256, (32, 32)))
    trainer.fit(model, DataLoader(data, batch_size=4), DataLoader(data, batch_size=8))
    if folder is not None:
        trainer.save_checkpoint(f"{folder}/last.ckpt")
    return model


if __name__ == "__main__":
    print(train().losses)
