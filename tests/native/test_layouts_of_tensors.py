"""Every layout that a pack or a GGUF file may have for a tensor is one that the tensor's only user can compute with, or
it is refused by name where the engine loads it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import slow_except
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.formats.index import PARTS, DenseTensor, ExpertLayer, Extent, Level, ModelIndex, Part, Section
from edgemoe.formats.layouts import GGML_LAYOUTS, LAYOUTS, QUANTIZED, pack, packed_size, unpack
from edgemoe.options import EngineOptions
from edgemoe.quantize.rtn import quantize
from edgemoe.spec import AttentionSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec
from tools import ggml_quantize

HIDDEN = 256
TOKENS = np.arange(3, 15, dtype=np.int32)
MATRIX_LAYOUTS = (*(layout for layout in LAYOUTS if layout != "vector"), *GGML_LAYOUTS)
FLOAT_ONLY = ".conv"
FAST = (("full", "layers.1.router"), ("gated_delta", "layers.1.conv"))
OPTIONS = EngineOptions(threads=1, context=64, chunk=8, expert_slots=8, cache_type_k="f32", cache_type_v="f32")

# All rows are of 256 weights, which are whole blocks of every layout, except those of convolutions.
ROPE = RopeSpec(tuple(10000 ** (-i / 16) for i in range(16)))
MIXERS = {
    "full": AttentionSpec("full", 4, 2, 64, 64, 0.125, ROPE, bias=True, output_gate=False, sinks=True),
    "mla": AttentionSpec(
        *("mla", 2, 1, HIDDEN + 32, 128, 0.06, ROPE),
        **{"q_rank": HIDDEN, "kv_rank": HIDDEN, "rope_dim": 32, "latent_norm_epsilon": 1e-6},
    ),
    "gated_delta": AttentionSpec("gated_delta", 4, 2, 32, 64, 0.2, None, conv_size=4),
    "short_conv": AttentionSpec("short_conv", 1, 1, HIDDEN, HIDDEN, 1.0, None, conv_size=3),
}


def spec_of(kind: str) -> ModelSpec:
    """A dense layer, and one with experts and a shared one."""
    dense = LayerSpec(MIXERS[kind], HIDDEN)
    routed = LayerSpec(
        MIXERS[kind], HIDDEN, experts=4, top_k=2, router=RouterSpec(bias=True), shared_dim=HIDDEN, shared_gate=True
    )
    return ModelSpec("test", 48, HIDDEN, 64, (dense, routed), 1e-6)


def encoded(layout: str, weights: NDArray[np.float32]) -> bytes:
    if layout == "vector":
        return weights.tobytes()
    if layout in QUANTIZED:
        return pack(layout, *quantize(weights, QUANTIZED[layout])).tobytes()
    if layout.startswith("ggml."):
        return ggml_quantize.quantize(layout.removeprefix("ggml."), weights).tobytes()
    if layout == "bf16":
        return pack(layout, (weights.view(np.uint32) >> 16).astype("<u2")).tobytes()
    return pack(layout, weights.astype(np.float16 if layout == "f16" else np.float32)).tobytes()


class Model:
    """A random model in float32, in a file."""

    def __init__(self, path: Path, kind: str) -> None:
        rng = np.random.default_rng(1)
        self.values: dict[str, NDArray[np.float32]] = {}
        """Of every tensor."""
        self._work = path.parent
        spec, data, sections = spec_of(kind), bytearray(), list[Section]()

        def add(name: str, shape: tuple[int, ...]) -> tuple[str, Extent]:
            values = rng.standard_normal(shape).astype(np.float32) * np.float32(0.06)
            self.values[name] = values + np.float32(name.endswith("norm"))
            layout = "vector" if len(shape) == 1 else "f32"
            return layout, append(data, encoded(layout, self.values[name]))

        dense, experts = {}, {}
        for name, shape in spec.dense_tensors().items():
            layout, extent = add(name, shape)
            dense[name] = DenseTensor(len(sections), 0, layout, shape)
            sections.append(Section((extent,)))
        for number, layer in enumerate(spec.layers):
            shapes, numbers = spec.expert_tensors(number), []
            for expert in range(layer.experts):
                extents = [add(f"{part} {expert}", shapes[part])[1] for part in PARTS]
                numbers.append((len(sections),))
                sections.append(Section(tuple(extents)))
            if numbers:
                parts = {part: Part("f32", place, 0, shapes[part]) for place, part in enumerate(PARTS)}
                experts[number] = ExpertLayer((Level(32, parts),), tuple(numbers))
        path.write_bytes(data)
        self.index = ModelIndex(path, (str(path),), spec, tuple(sections), dense, experts)
        self.logits = logits(self.index)

    def with_layout(self, name: str, layout: str) -> tuple[ModelIndex, ModelIndex]:
        """The same model with a matrix, or one part of all experts, in another layout; and in float32 with the values
        that this layout gives."""
        names = [name] if name in self.values else [key for key in self.values if key.startswith(f"{name} ")]
        packed = [encoded(layout, self.values[key]) for key in names]
        values = [unpack(layout, data, *self.values[key].shape) for key, data in zip(names, packed, strict=True)]
        plain = [encoded("f32", found) for found in values]
        return self._replaced(name, layout, packed, "a"), self._replaced(name, "f32", plain, "b")

    def _replaced(self, name: str, layout: str, contents: list[bytes], file: str) -> ModelIndex:
        index, data = self.index, bytearray()
        extents = [dataclasses.replace(append(data, content), file=1) for content in contents]
        (self._work / file).write_bytes(data)
        sections, dense, experts = list(index.sections), dict(index.dense), dict(index.experts)
        if name in dense:
            dense[name] = DenseTensor(len(sections), 0, layout, dense[name].shape)
            sections.append(Section((extents[0],)))
        else:
            for (number,), extent in zip(experts[1].sections, extents, strict=True):
                old = sections[number].extents
                sections[number] = Section(tuple(extent if PARTS[i] == name else old[i] for i in range(3)))
            level = experts[1].levels[0]
            parts = {**level.parts, name: dataclasses.replace(level.parts[name], layout=layout)}
            experts[1] = dataclasses.replace(experts[1], levels=(Level(32, parts),))
        files = (*index.files, str(self._work / file))
        return dataclasses.replace(index, files=files, sections=tuple(sections), dense=dense, experts=experts)


def append(data: bytearray, content: bytes) -> Extent:
    data += bytes(-len(data) % 4096)
    data += content
    return Extent(0, len(data) - len(content), len(content))


def logits(index: ModelIndex) -> NDArray[np.float32]:
    rows = np.arange(len(TOKENS), dtype=np.int32)
    return _core.Engine(index, OPTIONS).forward(TOKENS, rows, np.zeros_like(rows), rows)


def matrices(kind: str) -> list[str]:
    """Names of the matrices of a model, each user once."""
    spec = spec_of(kind)
    names = [name for name, shape in spec.dense_tensors().items() if len(shape) == 2]
    return [*names, *PARTS]


def cases() -> Iterator[tuple[str, str]]:
    for kind in MIXERS:
        for name in matrices(kind):
            # What does not belong to the mixer is the same for all kinds.
            if kind == "full" or re.match(r"layers\.1\.(?!router|shared)", name):
                yield kind, name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {kind: Model(tmp_path_factory.mktemp(kind) / "model", kind) for kind in MIXERS}


@pytest.mark.parametrize(
    "case", slow_except(cases(), ("full", "layers.1.router"), ("gated_delta", "layers.1.conv")), ids="-".join
)
def test_each_is_computed_or_refused_by_name(models: dict[str, Model], case: tuple[str, str]) -> None:
    kind, name = case
    model = models[kind]
    columns = model.index.dense[name].shape[1] if name in model.index.dense else HIDDEN
    for layout in MATRIX_LAYOUTS:
        try:
            packed_size(layout, 16, columns)
        except ValueError:
            continue  # rows that are no whole blocks are refused where the file is read
        changed, plain = model.with_layout(name, layout)
        if name.endswith(FLOAT_ONLY) and layout not in ("f32", "ggml.f32"):
            with pytest.raises(ValueError, match=f"tensor {re.escape(name)} is of type .*: it must be f32"):
                logits(changed)
            continue
        found, expected = logits(changed), logits(plain)
        assert layout in ("f32", "ggml.f32") or (expected != model.logits).any(), f"{name} has no effect"
        if layout.removeprefix("ggml.") in ("f32", "bf16", "f16"):
            np.testing.assert_array_equal(found, expected, f"{name} {layout}")
        else:  # what is multiplied is rounded to int8
            assert np.abs(found - expected).mean() < 0.03 * expected.std(), f"{name} {layout}"
