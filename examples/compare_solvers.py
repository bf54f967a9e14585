"""Compare all solvers over a sweep of budgets on one model: predicted overhead, or `-` if infeasible.

python examples/compare_solvers.py --model resnet
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from rematplan import HostMemory, compare, format_bytes, pareto, solve

FRACTIONS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model in train mode, and a batch."""
    torch.manual_seed(0)
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=256, n_positions=128, n_embd=128, n_layer=8, n_head=4, bos_token_id=0, eos_token_id=0
        )
        ids = torch.randint(0, 256, (8, 128))
        return GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": ids}
    if name == "resnet":
        from transformers import ResNetConfig, ResNetForImageClassification

        resnet = ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[3, 4, 6, 3], layer_type="basic"
        )
        labels = torch.randint(0, 2, (16,))
        return ResNetForImageClassification(resnet).train(), {
            "pixel_values": torch.randn(16, 3, 96, 96),
            "labels": labels,
        }
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    batch = {
        "sample": torch.randn(4, 4, 32, 32),
        "timestep": torch.tensor([3, 70, 500, 900]),
        "encoder_hidden_states": torch.randn(4, 8, 32),
    }
    return unet.train(), batch


def main() -> None:
    """Capture the model once; then every solver at every budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("gpt2", "resnet", "unet"), default="gpt2")
    parser.add_argument("--keep", help="stages that `selective` keeps: a regular expression")
    arguments = parser.parse_args()
    console = Console()
    model, batch = build(arguments.model)
    with console.status("capturing and measuring"):
        plan = solve(model, 2**50, sample=batch)
    chain = plan.chain
    activations = plan.plain.peak - chain.fixed
    console.print(
        f"{chain.name}: {len(chain)} stages, {format_bytes(chain.fixed)} live all step, plain peak "
        f"{format_bytes(plan.plain.peak)}, {chain.plain_seconds * 1e3:.1f} ms; {plan.capture.reason}"
    )
    low = pareto(chain).points[0].peak
    budgets = [chain.fixed + int(fraction * activations) for fraction in FRACTIONS]
    link = sum(stage.options[0].saved for stage in chain.stages) / chain.plain_seconds
    host = HostMemory(2**60, link, link, asynchronous=True)
    parameters: dict[str, dict[str, Any]] = {"two_level": {"host": host}}
    if arguments.keep:
        parameters["selective"] = {"keep": arguments.keep}
    print(compare(chain, [*(b for b in budgets if b > low), low], parameters=parameters))


if __name__ == "__main__":
    main()
