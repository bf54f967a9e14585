"""Train a diffusion model on scikit-learn's digits under a memory budget, with an average of its weights.

The loop is that of diffusers' examples: the loss is computed outside the U-Net.

    python examples/train_diffusion.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits

from rematplan import execute, solve

BATCH = 16


def train(budget: str | None = "5MiB", steps: int = 20) -> tuple[list[float], torch.nn.Module]:
    """Losses of every step, and the U-Net with its averaged weights; plainly where there is no budget."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    unet: Any = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    unet.train()
    noises: Any = DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    average = EMAModel(unet.parameters(), decay=0.9)

    model: torch.nn.Module = unet
    if budget is not None:
        sample = (torch.randn(BATCH, 1, 8, 8), torch.zeros(BATCH, dtype=torch.long))
        plan = solve(unet, budget, sample=sample, optimizer=optimizer)
        print(plan)
        model = execute(plan, unet)

    torch.manual_seed(1)
    losses = []
    for step in range(steps):
        clean = images[step * BATCH : (step + 1) * BATCH]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 100, (len(clean),))
        predicted = model(noises.add_noise(clean, noise, timesteps), timesteps).sample
        loss = F.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        losses.append(loss.item())
    average.copy_to(unet.parameters())
    return losses, unet


if __name__ == "__main__":
    losses, _ = train(steps=100)
    print(f"first losses {losses[:3]}, last {losses[-3:]}")
