#!/usr/bin/env python3
"""Logits of GGUF files, as llama.cpp computes them beside what Polder's engine did.

    pip install llama-cpp-python
    POLDER_GGUF_OUT=FOLDER cargo test --release --test gguf_families the_engine
    python kernels/benches/peers/logits_beside_llama_cpp.py FOLDER

The test writes `NAME.gguf` and `NAME.json` (ids, and our logits of every position) of a tiny model of each family. Each
is loaded in a process of its own, since llama.cpp ends it where a file displeases it. Weights and caches are in F32.

`POLDER_GGUF_FILES` adds published files. Where they are packed, both round activations, each in its own way: then only
widened files (F32) tell whether a model is understood.
"""

import ctypes
import json
import pathlib
import subprocess
import sys

TOLERANCE = 2e-4
# Its GELU is a table of 16-bit floats.
TOLERANCES = {"gemma3_text": 1e-2}


def theirs(path, tokens):
    import llama_cpp as llama

    def log(level, text, data):
        if level >= 3:
            print(text.decode(errors="replace"), end="", file=sys.stderr)

    quiet = llama.llama_log_callback(log)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(path.encode(), settings)
    if not model:
        sys.exit("not loaded")
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = llama.GGML_TYPE_F32
    settings.flash_attn_type = 0
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
    if llama.llama_decode(context, batch) != 0:
        sys.exit("not computed")
    words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows = [llama.llama_get_logits_ith(context, i)[:words] for i in range(len(tokens))]
    print(json.dumps([value for row in rows for value in row]))


def main():
    failed = 0
    for file in sorted(pathlib.Path(sys.argv[1]).glob("*.gguf")):
        case = json.loads(file.with_suffix(".json").read_text())
        command = [sys.executable, __file__, "--one", str(file), json.dumps(case["tokens"])]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            said = [line for line in run.stderr.splitlines() if line.strip()]
            print(f"{file.stem:22} llama.cpp refuses it: {said[-1] if said else run.returncode}")
            failed += 1
            continue
        ours, other = case["logits"], json.loads(run.stdout)
        if len(ours) != len(other):
            print(f"{file.stem:22} {len(ours)} logits beside {len(other)}")
            failed += 1
            continue
        largest = max(abs(a - b) for a, b in zip(ours, other))
        width = len(ours) // len(case["tokens"])
        rows = [slice(i * width, (i + 1) * width) for i in range(len(case["tokens"]))]
        best = lambda values: max(range(width), key=values.__getitem__)
        greedy = sum(best(ours[row]) == best(other[row]) for row in rows)
        most = max(abs(value) for value in ours)
        within = largest < TOLERANCES.get(file.stem, TOLERANCE)
        failed += not within
        mark = " " if within else "!"
        print(f"{mark} {file.stem:22} largest difference {largest:.1e}, largest logit {most:.2f}, best {greedy} of {len(rows)}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        theirs(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
