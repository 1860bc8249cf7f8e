"""Scores an exported model with transformers: python exported_model.py MODEL TEXTS SEQ

Prints one JSON object: bits per UTF-8 byte of each TEXTS/LANG.txt, in windows of SEQ tokens as a run scores them. It exits
with 3 where this Python has no transformers.
"""

import json
import math
import pathlib
import sys

try:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(3)


def bits_per_byte(model, tokenizer, text, start, seq):
    stream = [start] + tokenizer.encode(text, add_special_tokens=False)
    nats = 0.0
    for at in range(0, len(stream) - 1, seq):
        window = torch.tensor([stream[at : at + seq + 1]])
        with torch.no_grad():
            logits = model(window[:, :-1]).logits[0].double()
        nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


def main():
    folder, texts, seq = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    start = model.config.eos_token_id
    found = {
        path.stem: bits_per_byte(model, tokenizer, path.read_text(encoding="utf-8"), start, seq)
        for path in sorted(texts.glob("*.txt"))
    }
    print(json.dumps(found))


main()
