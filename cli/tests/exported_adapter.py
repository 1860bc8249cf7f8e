"""Loads a base model with an exported adapter through PEFT, and the merged model beside it, and compares their logits.

    python exported_adapter.py BASE ADAPTER MERGED

Prints the largest difference; ends with status 3 where there is no PEFT.
"""

import sys

try:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def main():
    base, adapter, merged = sys.argv[1:]
    ids = torch.arange(64).reshape(2, 32) * 3 % 250
    with torch.no_grad():
        plain = load(base)(ids).logits
        adapted = PeftModel.from_pretrained(load(base), adapter)(ids).logits
        right = load(merged)(ids).logits
    moved = (right - plain).abs().max().item()
    assert moved > 0.01, f"the adapter changes nothing: {moved}"
    print((adapted - right).abs().max().item())


main()
