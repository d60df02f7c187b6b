"""A child of `compare_llama_cpp`: llama.cpp (xllamacpp) reads a GGUF, and its log probabilities after each token are
written.

Its argument is JSON: path, tokens, vocabulary, threads, target, sampled (a token that is always the one sampled, where
others may be pieces of a character, which llama.cpp holds back; probabilities do not depend on it), context (0: a
little more than the tokens), exact (whether to keep keys and values in 32 bits and to leave out its flash attention,
which rounds more). `target` becomes float32 [tokens, vocabulary], without a header. A server gives out the
probabilities of as many tokens as are asked for: here, of all of them.
"""

import array
import json
import math
import sys


def log_probabilities(path, tokens, vocabulary, threads, target, sampled=None, context=0, exact=False):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context or len(tokens) + 16
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.fit_params = False
    params.warmup = False
    params.cache_ram_mib = 0
    params.n_ctx_checkpoints = 0
    params.ui = False
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 2  # with what goes wrong
    server = xllamacpp.Server(params)
    with open(target, "wb") as out:  # noqa: PTH123
        for end in range(1, len(tokens) + 1):
            # What it has computed it keeps; only the last token is new.
            request = {"prompt": tokens[:end], "n_predict": 1, "temperature": 0, "logprobs": vocabulary}
            if sampled is not None:
                request["logit_bias"] = [[sampled, 1000.0]]
            answer = server.handle_completions({**request, "cache_prompt": end > 1})
            row = array.array("f", [math.nan]) * vocabulary
            for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
            row.tofile(out)


if __name__ == "__main__":
    log_probabilities(**json.loads(sys.argv[1]))
