"""A child of bench/kernels.py: times onnxruntime's QMoE operator and prints one line of JSON, tokens -> seconds.

Its argument is JSON: hidden, ffn, experts, top_k, threads, tokens (a list), repetitions. Weights are random 4-bit codes
with a float32 scale for 64 of them; gate and up are one matrix, as the operator wants it.
"""

import json
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

BLOCK = 64


def session(options):
    hidden, ffn, experts = options["hidden"], options["ffn"], options["experts"]
    random = np.random.default_rng(1)
    weights = []

    def add(name, array):
        weights.append(onnx.numpy_helper.from_array(array, name))

    for name, rows, cols in (("fc1", 2 * ffn, hidden), ("fc2", hidden, ffn)):
        add(f"{name}_weights", random.integers(0, 256, (experts, rows, cols // 2), np.uint8))
        add(f"{name}_scales", np.full((experts, rows, cols // BLOCK), 0.01 / np.sqrt(cols), np.float32))
    node = helper.make_node(
        "QMoE",
        ["x", "router", "fc1_weights", "fc1_scales", "", "fc2_weights", "fc2_scales"],
        ["y"],
        domain="com.microsoft",
        k=options["top_k"],
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=1,
        expert_weight_bits=4,
        block_size=BLOCK,
    )
    graph = helper.make_graph(
        [node],
        "experts",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", hidden]),
            helper.make_tensor_value_info("router", TensorProto.FLOAT, ["tokens", experts]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", hidden])],
        weights,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options["threads"]
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def main():
    options = json.loads(sys.argv[1])
    run = session(options)
    random = np.random.default_rng(2)
    times = {}
    for tokens in options["tokens"]:
        # As many different inputs as a generation of 64 tokens has: other experts each time.
        calls = 64 if tokens == 1 else 1
        inputs = [
            {
                "x": random.standard_normal((tokens, options["hidden"]), np.float32),
                "router": random.standard_normal((tokens, options["experts"]), np.float32),
            }
            for _ in range(calls)
        ]
        times[tokens] = []
        for number in range(options["repetitions"] + 1):
            begin = time.perf_counter()
            for one in inputs:
                run.run(None, one)
            if number:
                times[tokens].append((time.perf_counter() - begin) / calls)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
