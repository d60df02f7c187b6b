"""A child of `quality`: quantizes matrices with llama.cpp's own functions (the library in xllamacpp), as long as its
standard input gives it some.

A request is a line of JSON, {"type": ggml's number, "rows", "columns", "nbytes": of the answer}, and then the float32
values; the answer is the blocks. The function is ggml_quantize_chunk, which llama-quantize calls for every tensor;
there is no importance matrix.
"""

import ctypes
import json
import sys


def serve(requests, answers):
    import xllamacpp.xllamacpp as module

    library = ctypes.CDLL(module.__file__)
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    for line in iter(requests.readline, b""):
        request = json.loads(line)
        values = bytearray(requests.read(4 * request["rows"] * request["columns"]))
        source = (ctypes.c_char * len(values)).from_buffer(values)
        target = ctypes.create_string_buffer(request["nbytes"])
        written = quantize(request["type"], source, target, 0, request["rows"], request["columns"], None)
        if written != request["nbytes"]:
            raise SystemExit(f"llama.cpp wrote {written} bytes instead of {request['nbytes']}")
        answers.write(target.raw)
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
