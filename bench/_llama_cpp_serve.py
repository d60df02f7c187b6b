"""A child of the benchmarks: loads a GGUF with llama.cpp (xllamacpp), then answers requests as bench/_serve.py does.

Its argument is JSON: path, threads, context, repack (whether llama.cpp may rearrange weights for its fastest kernels).
The seconds are llama.cpp's own, of computing alone: no request is parsed in them and no prompt tokenized.
"""

import json
import random
import sys


def main():
    import xllamacpp

    options = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = options["path"]
    params.n_ctx = options["context"]
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.no_extra_bufts = not options["repack"]
    params.fit_params = False
    params.warmup = False
    params.cache_ram_mib = 0
    params.n_ctx_checkpoints = 0
    params.ui = False
    params.verbosity = 1
    server = xllamacpp.Server(params)
    numbers = random.Random(1)

    def compute(prompt, generated):
        request = {"prompt": prompt, "n_predict": generated, "temperature": 0, "samplers": ["temperature"]}
        answer = server.handle_completions({**request, "ignore_eos": True, "cache_prompt": False})
        return answer["timings"]

    for line in sys.stdin:
        request = json.loads(line)
        answer = {}
        if "prompt" in request:
            count = request["prompt"]
            timings = compute([numbers.randrange(2, 256) for _ in range(count)], 1)
            if timings["prompt_n"] != count:
                raise SystemExit(f"llama.cpp computed {timings['prompt_n']} tokens instead of {count}")
            answer = {"tokens": count, "seconds": timings["prompt_ms"] / 1e3}
        if "generate" in request:
            # The first one generated comes with the prompt; the time is that of the others.
            timings = compute([1], request["generate"] + 1)
            answer = {"tokens": timings["predicted_n"] - 1, "seconds": timings["predicted_ms"] / 1e3}
        print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
