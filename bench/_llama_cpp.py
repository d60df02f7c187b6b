"""A child of the benchmarks: runs a GGUF with llama.cpp (xllamacpp) on given tokens and prints one line of JSON.

Its argument is JSON. The model is mapped (mmap), its weights are not repacked (repacked ones are held twice), nothing
is offloaded. A token is forced by asking for the continuation of the sequence with it: llama.cpp keeps what it has
computed and computes one token, alone, as it does when it generates.
"""

import json
import resource
import sys
import time
from pathlib import Path


def decode(path, threads, context, prompt, tokens, warm=False, repack=False):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.no_extra_bufts = not repack
    params.fit_params = False
    params.warmup = False
    params.cache_ram_mib = 0
    params.n_ctx_checkpoints = 0
    params.ui = False
    params.verbosity = 1
    begin = time.perf_counter()
    server = xllamacpp.Server(params)
    load_seconds = time.perf_counter() - begin

    def compute(sequence, expected, anew=False):
        begin = time.perf_counter()
        request = {"prompt": sequence, "n_predict": 1, "temperature": 0, "cache_prompt": not anew}
        timings = server.handle_completions(request)["timings"]
        if timings["prompt_n"] != expected:
            raise SystemExit(f"llama.cpp computed {timings['prompt_n']} tokens instead of {expected}")
        return time.perf_counter() - begin

    if warm:
        compute(prompt + tokens, len(prompt) + len(tokens), anew=True)
    prompt_seconds = compute(prompt, len(prompt), anew=True)
    sequence, seconds = list(prompt), []
    read, faults = storage_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    for token in tokens:
        sequence.append(token)
        seconds.append(compute(sequence, 1))
    return {
        "load_seconds": load_seconds,
        "prompt_seconds": prompt_seconds,
        "token_seconds": seconds,
        "storage_bytes": storage_bytes() - read,
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
        "build": str(getattr(xllamacpp, "BUILD_INFO", "")),
        "version": str(getattr(xllamacpp, "__version__", "")),
    }


def storage_bytes():
    """Bytes that this process has had read from storage so far, page faults included (Linux)."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0.0
    return float(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


if __name__ == "__main__":
    print(json.dumps(decode(**json.loads(sys.argv[1]))))
