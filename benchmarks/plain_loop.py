"""What one would write by hand instead: a GPT and its training loop in a hundred lines.

Used by `versus_plain_loop.py`. It shares nothing with casallm but the shards: plain PyTorch,
windows drawn at random, the usual AdamW and cosine. Same shape and initialisation as the modern
family.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Shape:
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    vocab_size: int
    context_length: int


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.n_heads, self.d_head = s.n_heads, s.d_model // s.n_heads
        self.qkv = nn.Linear(s.d_model, 3 * s.d_model, bias=False)
        self.out = nn.Linear(s.d_model, s.d_model, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.d_head), nn.RMSNorm(self.d_head)

    def forward(self, x, cos, sin):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, self.d_head).unbind(2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(s.d_model), nn.RMSNorm(s.d_model)
        self.attention = Attention(s)
        self.gate, self.up = (nn.Linear(s.d_model, s.d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(s.d_ff, s.d_model, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainGPT(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.embedding = nn.Embedding(s.vocab_size, s.d_model)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.n_layers))
        self.norm = nn.RMSNorm(s.d_model)
        d_head = s.d_model // s.n_heads
        angles = torch.outer(
            torch.arange(s.context_length), 10_000.0 ** -(torch.arange(0, d_head, 2) / d_head)
        )
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                zero = name.endswith(("out.weight", "down.weight"))
                std = 0.02 if name.startswith("embedding") else s.d_model**-0.5
                nn.init.zeros_(p) if zero else nn.init.normal_(p, std=std)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class PlainLoop:
    """One step at a time, so that the benchmark can take turns."""

    def __init__(self, shape: Shape, tokens: np.ndarray, batch_size: int, steps: int, lr: float):
        torch.manual_seed(0)
        self.shape, self.tokens, self.batch_size = shape, tokens, batch_size
        self.steps, self.lr, self.done = steps, lr, 0
        self.model = PlainGPT(shape)
        self.compiled = torch.compile(self.model)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        self.random = np.random.default_rng(0)

    def batch(self):
        T = self.shape.context_length
        starts = self.random.integers(0, len(self.tokens) - T - 1, self.batch_size)
        rows = np.stack([self.tokens[i : i + T + 1] for i in starts]).astype(np.int64)
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])

    def step(self) -> float:
        warmup = math.ceil(0.05 * self.steps)
        progress = (self.done - warmup) / max(self.steps - 1 - warmup, 1)
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * ((self.done + 1) / warmup if self.done < warmup else cosine)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.compiled(*self.batch())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.item()
