"""A training step of a Llama in PyTorch eager with SDPA, measured as `benches/training.rs` measures ours.

    python pytorch.py VOCABULARY HIDDEN WIDE BLOCKS HEADS KV_HEADS TIED BATCH SEQ STEPS THREADS BF16

Prints one line of JSON: seconds and CPU seconds of each step after one to warm up, and the peak of resident memory.
"""

import json
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, hidden, wide, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, hidden // heads
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.gate = nn.Linear(hidden, wide, bias=False)
        self.up = nn.Linear(hidden, wide, bias=False)
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x, cosines, sines):
        batch, seq, hidden = x.shape
        normed = self.norm(x)
        heads = lambda y, count: y.view(batch, seq, count, self.width).transpose(1, 2)
        q = rotate(heads(self.q(normed), self.heads), cosines, sines)
        k = rotate(heads(self.k(normed), self.kv_heads), cosines, sines)
        v = heads(self.v(normed), self.kv_heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, seq, hidden))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def rotate(x, cosines, sines):
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


class Llama(nn.Module):
    def __init__(self, vocabulary, hidden, wide, blocks, heads, kv_heads, tied):
        super().__init__()
        self.width = hidden // heads
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, wide, heads, kv_heads) for _ in range(blocks))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, targets):
        seq = tokens.shape[1]
        frequencies = 100000.0 ** (-torch.arange(0, self.width, 2) / self.width)
        angles = torch.outer(torch.arange(seq), frequencies).repeat(1, 2)
        cosines, sines = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cosines, sines)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main():
    vocabulary, hidden, wide, blocks, heads, kv_heads, tied, batch, seq, steps, threads, bf16 = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model = Llama(vocabulary, hidden, wide, blocks, heads, kv_heads, tied)
    # `fused` is the fastest and the leanest of PyTorch's implementations.
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    wall, cpu = [], []
    for step in range(1 + steps):
        tokens = torch.randint(vocabulary, (batch, seq + 1))
        start, cpu_start = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16 == 1):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step > 0:
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"parameters": parameters, "wall": wall, "cpu": cpu, "peak_bytes": peak, "loss": loss.item()}))


main()
