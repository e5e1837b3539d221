"""Optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

The state is handed out and taken back as flat tensors named after the parameter they belong to
(`blocks.0.attention.query.weight.exp_avg`), so that a checkpoint depends on no order and no pickle.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from casallm.config import Config


class OptimConfig(Config):
    """How weights follow gradients."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon (Jordan 2024) on the blocks' matrices, AdamW on all else."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate (GPT-3, Table 2.1); Muon's updates are scaled to AdamW's size."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment (GPT-3, appendix B)."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment (GPT-3, appendix B)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices and embeddings; biases and norms have none."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient (GPT-3, appendix B)."""


class Optimizers:
    """The optimizers of one model, stepped and saved as one."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self._names: dict[torch.Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        self._config = config
        matrices = [p for p in self._names if self._is_muon_matrix(p)]
        others = [p for p in self._names if not self._is_muon_matrix(p)]
        self._adamw = _build_adamw(others, config)
        self._muon = _build_muon(matrices, config) if matrices else None
        self._init_state()

    def step(self, lr_fraction: float) -> None:
        """Apply the gradients at this fraction of the peak learning rates, then drop them."""
        for optimizer in self._each():
            for group in optimizer.param_groups:
                group["lr"] = self._config.lr * lr_fraction
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._names:
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state by name; live ones, not copies."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for optimizer in self._each():
            for parameter, state in optimizer.state.items():
                for key, value in sorted(state.items()):
                    yield f"{self._names[parameter]}.{key}", value

    def _each(self) -> Iterator[torch.optim.Optimizer]:
        yield self._adamw
        if self._muon is not None:
            yield self._muon

    def _is_muon_matrix(self, parameter: torch.Tensor) -> bool:
        is_block = self._names[parameter].startswith("blocks.")
        return self._config.name == "muon" and is_block and parameter.ndim == 2

    def _init_state(self) -> None:
        """Create the moments now, so that a load can fill them and a save is always whole."""
        for parameter in self._names:
            if self._is_muon_matrix(parameter) and self._muon is not None:
                self._muon.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                continue
            state = self._adamw.state[parameter]
            on = parameter.device if parameter.is_cuda else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=on)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients down to `max_norm`; the norm before, on the device, no waiting."""
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True)


def _build_adamw(parameters: list[torch.Tensor], config: OptimConfig) -> torch.optim.AdamW:
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )


def _build_muon(parameters: list[torch.Tensor], config: OptimConfig) -> torch.optim.Muon:
    return torch.optim.Muon(
        parameters,
        lr=config.lr,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
