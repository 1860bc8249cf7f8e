#!/usr/bin/env python3
"""Polder's engine beside llama.cpp: the same files, the same threads, turn about, medians and ratios.

    pip install llama-cpp-python
    python kernels/benches/peers/beside_llama_cpp.py --polder target/release/polder MODEL.gguf ... --threads 1 2

Every round starts a new process of each program. llama.cpp gets what it is built for: flash attention as it chooses,
f16 caches, batches of 512. Its time to the first token leaves out the start of Python and the import of its binding;
ours is that of the whole process.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time

ROWS = ["decode", "prefill", "together", "first_token"]
QUESTION = b"Once upon a time, in a land below the sea,"


def peer(arguments):
    """Measures llama.cpp in this process, and prints JSON."""
    import llama_cpp as llama

    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    threads = arguments.threads[0]
    start = time.perf_counter()
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(arguments.models[0].encode(), settings)
    vocabulary = llama.llama_model_get_vocab(model)

    def context_of(tokens, sessions):
        settings = llama.llama_context_default_params()
        settings.n_ctx = tokens * sessions
        settings.n_seq_max = sessions
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        return llama.llama_init_from_model(model, settings)

    words = llama.llama_vocab_n_tokens(vocabulary)

    def batch_of(rows):
        batch = llama.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, session, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, session, wanted
        return batch

    def run(context, rows):
        batch = batch_of(rows)
        if llama.llama_decode(context, batch) != 0:
            sys.exit("llama.cpp refuses a batch")
        wanted = [i for i, row in enumerate(rows) if row[3]]
        for i in wanted:
            llama.llama_get_logits_ith(context, i)[0]
        llama.llama_batch_free(batch)

    if arguments.first_token:
        context = context_of(512, 1)
        tokens = (llama.llama_token * 64)()
        count = llama.llama_tokenize(vocabulary, QUESTION, len(QUESTION), tokens, 64, True, True)
        run(context, [(tokens[i], i, 0, i + 1 == count) for i in range(count)])
        print(json.dumps({"first_token": time.perf_counter() - start}))
        sys.stdout.flush()
        os._exit(0)

    prompt = 16

    def decode(sessions):
        context = context_of(prompt + arguments.decode + 16, sessions)
        for session in range(sessions):
            rows = [((i + session) * 97 % words, i, session, i + 1 == prompt) for i in range(prompt)]
            run(context, rows)
        start = time.perf_counter()
        for step in range(arguments.decode):
            run(context, [(step * 31 % words, prompt + step, session, True) for session in range(sessions)])
        seconds = time.perf_counter() - start
        llama.llama_free(context)
        return sessions * arguments.decode / seconds

    def prefill():
        count = arguments.prefill
        context = context_of(count, 1)
        rows = [(i * 97 % words, i, 0, i + 1 == count) for i in range(count)]
        start = time.perf_counter()
        run(context, rows)
        seconds = time.perf_counter() - start
        llama.llama_free(context)
        return count / seconds

    figures = {name: [] for name in ROWS[:3]}
    for repeat in range(arguments.repeats + 1):
        taken = (decode(1), prefill(), decode(arguments.sessions))
        if repeat > 0:
            for name, value in zip(ROWS, taken):
                figures[name].append(value)
    print(json.dumps({name: statistics.median(values) for name, values in figures.items()}))
    sys.stdout.flush()
    os._exit(0)


def output_of(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(arguments, model, threads):
    command = [arguments.polder, "--json", "bench", "engine", model, "--threads", str(threads)]
    for name in ["decode", "prefill", "sessions", "repeats"]:
        command += [f"--{name}", str(getattr(arguments, name))]
    found = output_of(command)
    figures = {name: found[f"{name}_tokens_per_second"] for name in ROWS[:3]}
    return figures | {"first_token": found["first_token_seconds"]}


def theirs(arguments, model, threads):
    command = [sys.executable, __file__, "--peer", model, "--threads", str(threads)]
    for name in ["decode", "prefill", "sessions", "repeats"]:
        command += [f"--{name}", str(getattr(arguments, name))]
    figures = output_of(command)
    first = [output_of(command + ["--first-token"])["first_token"] for _ in range(arguments.repeats)]
    return figures | {"first_token": statistics.median(first)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files")
    parser.add_argument("--polder", default="target/release/polder", help="the binary")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each")
    parser.add_argument("--repeats", type=int, default=2, help="figures of each process")
    parser.add_argument("--decode", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--sessions", type=int, default=8, help="sessions that decode together")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first-token", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return peer(arguments)
    try:
        import llama_cpp
    except ImportError:
        sys.exit("llama-cpp-python is not installed: there is nothing to compare with")
    print(f"llama-cpp-python {llama_cpp.__version__}; {arguments.rounds} rounds, medians")
    print("| model | threads | what | polder | llama.cpp | ratio |\n|---|---|---|---|---|---|")
    for model in arguments.models:
        for threads in arguments.threads:
            pairs = [(ours(arguments, model, threads), theirs(arguments, model, threads)) for _ in range(arguments.rounds)]
            for name in ROWS:
                own, peer_own = (statistics.median(pair[side][name] for pair in pairs) for side in (0, 1))
                ratio = statistics.median(pair[0][name] / pair[1][name] for pair in pairs)
                unit, factor = ("ms", 1e3) if name == "first_token" else ("tokens/s", 1)
                cells = [os.path.basename(model), threads, f"{name}, {unit}", f"{own * factor:.0f}"]
                print("|", " | ".join(map(str, cells + [f"{peer_own * factor:.0f}", f"{ratio:.2f}"])), "|", flush=True)


if __name__ == "__main__":
    main()
