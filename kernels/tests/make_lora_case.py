"""Writes tests/golden/lora.json: adapters on the case llama_rope_llama3, in plain torch.

    python make_lora_case.py      (torch, transformers, safetensors)
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent / "golden"
RANK, ALPHA, TARGETS = 4, 6.0, ["q_proj", "v_proj", "down_proj"]


def numbers(count, step, scale):
    """The numbers that the test in Rust begins with too."""
    return torch.tensor([math.sin(0.37 * at + step) * scale for at in range(count)], dtype=torch.float64)


class Adapted(torch.nn.Module):
    def __init__(self, linear, place):
        super().__init__()
        out, inner = linear.weight.shape
        self.linear = linear
        self.a = torch.nn.Parameter(numbers(RANK * inner, place, 0.05).float().reshape(RANK, inner))
        self.b = torch.nn.Parameter(numbers(out * RANK, place + 0.5, 0.05).float().reshape(out, RANK))

    def forward(self, x):
        return self.linear(x) + (x @ self.a.T @ self.b.T) * (ALPHA / RANK)


def main():
    model = AutoModelForCausalLM.from_pretrained(
        HERE / "llama_rope_llama3", dtype=torch.float32, attn_implementation="eager"
    )
    model.requires_grad_(False)
    adapted, place = {}, 0
    for layer, block in enumerate(model.model.layers):
        # In the order of the tensors in a block.
        for owner, name in [(block.self_attn, "q_proj"), (block.self_attn, "v_proj"), (block.mlp, "down_proj")]:
            module = Adapted(getattr(owner, name), float(place))
            setattr(owner, name, module)
            part = "self_attn" if owner is block.self_attn else "mlp"
            adapted[f"model.layers.{layer}.{part}.{name}"] = module
            place += 1
    ids = load_file(HERE / "llama_rope_llama3" / "cases.safetensors")["input_ids"].long()
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def loss():
        logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))

    parameters = [p for module in adapted.values() for p in (module.a, module.b)]
    optimiser = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, gradients = [], None
    for _ in range(4):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        if gradients is None:
            gradients = {
                f"{name}.lora_{which}.weight": getattr(module, which.lower()).grad.reshape(-1).tolist()
                for name, module in adapted.items()
                for which in "AB"
            }
        optimiser.step()
    case = {"rank": RANK, "alpha": ALPHA, "targets": TARGETS, "losses": losses, "gradients": gradients}
    (HERE / "lora.json").write_text(json.dumps(case))
    print(losses)


main()
