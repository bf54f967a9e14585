"""The device of the checks: a GPU, or the CPU in a dry run. torch is imported on first use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["Machine"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of device: "cuda" or "cpu"."""

    kind: str

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.kind == "cuda"

    @property
    def device(self) -> torch.device:
        """The device: of GPUs the first."""
        import torch

        return torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    def pick(self, on_cuda: T, on_cpu: T) -> T:
        """Choose a size: that of the GPU, or that of the dry run."""
        return on_cuda if self.cuda else on_cpu

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.cuda:
            import torch

            torch.cuda.synchronize(self.device)

    def moved(self, tree: T) -> T:
        """Copy tensors, or those in a container, to the device."""
        from torch import Tensor

        from rematplan.scheduler.torch_layer.private import pytree

        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self.device), tree)
