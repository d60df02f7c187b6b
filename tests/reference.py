"""A forward pass in plain NumPy, from a file's own weights: the reference the engine is compared with.

It reads a pack through the public reader, or another `WeightSource`, dequantizes whole matrices, and follows ModelSpec;
it shares no code with the C++ engine. Sums run in float64, so what differs is the engine's float32 rounding and nothing
else.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.formats.layouts import packed_size, unpack
from edgemoe.formats.pack import Pack
from edgemoe.spec import AttentionSpec, ModelSpec

Array = NDArray[np.float64]
GROUP = 64
PLAIN = ("vector", "f32", "bf16", "f16")


class WeightSource(Protocol):
    """Where the weights come from."""

    spec: ModelSpec

    def tensor(self, name: str) -> tuple[str, Array]:
        """Layout or type, and values, of the tensor of this engine name ("layers.0.experts.1.gate")."""


class PackWeights:
    """The weights of a pack."""

    def __init__(self, pack: Pack) -> None:
        self.pack, self.spec = pack, pack.index.spec

    def tensor(self, name: str) -> tuple[str, Array]:
        if ".experts." in name:
            _, layer, _, expert, part = name.split(".")
            table = self.pack.index.experts[int(layer)]
            place = table.levels[0].parts[part]
            section = table.sections[int(expert)][0]
            return place.layout, self._matrix(section, place.offset, place.layout, place.shape)
        tensor = self.pack.index.dense[name]
        return tensor.layout, self._matrix(tensor.section, tensor.offset, tensor.layout, tensor.shape)

    def _matrix(self, section: int, offset: int, layout: str, shape: tuple[int, ...]) -> Array:
        data = np.frombuffer(self.pack.read_section(section), np.uint8)[offset:]
        if layout == "vector":
            return np.frombuffer(data[: 4 * shape[0]].tobytes(), np.float32).astype(np.float64)
        return np.asarray(unpack(layout, data[: packed_size(layout, *shape)], *shape), np.float64)


class ReferenceModel:
    """Logits of a model.

    activations: "int8" quantizes the inputs of quantized matrices as the engine does; "exact" leaves them alone.
    """

    def __init__(self, source: Pack | WeightSource, activations: str = "int8") -> None:
        self.source = PackWeights(source) if isinstance(source, Pack) else source
        self.spec, self.activations = self.source.spec, activations
        self._weights: dict[str, tuple[str, Array]] = {}

    def logits(self, tokens: NDArray[np.int32]) -> Array:
        """float64 [tokens, vocab]."""
        spec = self.spec
        x = self._dense("embedding")[1][tokens]
        for number, layer in enumerate(spec.layers):
            prefix = f"layers.{number}."
            x = x + self._attention(layer.attention, prefix, self._norm(x, prefix + "attention_norm"))
            h = self._norm(x, prefix + "ffn_norm")
            if layer.experts:
                x = x + self._experts(number, h)
            else:
                inner = silu(self._product(h, prefix + "ffn.gate")) * self._product(h, prefix + "ffn.up")
                x = x + self._product(inner, prefix + "ffn.down")
        return self._product(self._norm(x, "final_norm"), "embedding" if spec.tied_embeddings else "head")

    # -- layers -------------------------------------------------------------------------------------------------

    def _attention(self, spec: AttentionSpec, prefix: str, h: Array) -> Array:
        count, dim, group = len(h), spec.head_dim, spec.heads // spec.kv_heads
        q = self._product(h, prefix + "q").reshape(count, spec.heads, dim)
        k = self._product(h, prefix + "k").reshape(count, spec.kv_heads, dim)
        v = self._product(h, prefix + "v").reshape(count, spec.kv_heads, dim)
        if spec.qk_norm == "head":
            q, k = self._norm(q, prefix + "q_norm"), self._norm(k, prefix + "k_norm")
        if spec.rope is not None:
            q, k = rotate(q, spec), rotate(k, spec)
        out = np.empty_like(q)
        mask = np.tril(np.ones((count, count), bool))
        for head in range(spec.heads):
            scores = np.where(mask, spec.scale * (q[:, head] @ k[:, head // group].T), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
        return self._product(out.reshape(count, -1), prefix + "o")

    def _experts(self, number: int, h: Array) -> Array:
        layer = self.spec.layers[number]
        assert layer.router is not None
        scores = self._product(h, f"layers.{number}.router")
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        out = np.zeros_like(h)
        for token, row in enumerate(scores):
            picks = np.argsort(-row, kind="stable")[: layer.top_k]
            weights = row[picks] / (row[picks].sum() if layer.router.renormalize else 1.0)
            for pick, weight in zip(picks, weights, strict=True):
                names = {part: f"layers.{number}.experts.{pick}.{part}" for part in ("gate", "up", "down")}
                inner = silu(self._product(h[token : token + 1], names["gate"]))
                inner = inner * self._product(h[token : token + 1], names["up"])
                out[token] += weight * self._product(inner, names["down"])[0]
        return out

    def _norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.spec.norm_epsilon) * self._dense(name)[1]

    def _product(self, x: Array, name: str) -> Array:
        layout, weights = self._dense(name)
        if layout not in PLAIN and self.activations == "int8":
            x = through_int8(x)
        return x @ weights.T

    def _dense(self, name: str) -> tuple[str, Array]:
        if name not in self._weights:
            self._weights[name] = self.source.tensor(name)
        return self._weights[name]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def rotate(x: Array, spec: AttentionSpec) -> Array:
    """x [tokens, heads, dim] at positions 0, 1, ..."""
    assert spec.rope is not None
    frequencies = np.asarray(spec.rope.inverse_frequencies, np.float32)
    angles = (np.arange(len(x), dtype=np.float32)[:, None] * frequencies).astype(np.float64)[:, None]
    cosine, sine = np.cos(angles) * spec.rope.attention_factor, np.sin(angles) * spec.rope.attention_factor
    half = len(frequencies)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], -1)


def through_int8(x: Array) -> Array:
    """x as the int8 codes and float32 scales of its groups of 64 represent it."""
    count, size = x.shape
    padded = np.zeros((count, -(-size // GROUP) * GROUP), np.float32)
    padded[:, :size] = x
    groups = padded.reshape(count, -1, GROUP)
    largest = np.abs(groups).max(-1, keepdims=True)
    safe = np.where(largest > 0, largest, 1)
    codes = np.rint(groups * (np.float32(127) / safe))
    return (codes.astype(np.float64) * (largest / np.float32(127))).reshape(count, -1)[:, :size]
