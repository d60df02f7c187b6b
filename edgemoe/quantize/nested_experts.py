"""Quantizes the experts of a model at several widths, layer by layer, while a calibration text runs through it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.errors import MemoryBudgetError, OptionError, SourceError
from edgemoe.formats.index import PARTS, ExpertLayer, Level, Part
from edgemoe.formats.layouts import pack_level, packed_size
from edgemoe.formats.pack import ALIGNMENT, BLOCK, Bytes, PackContents, PackWriter, align
from edgemoe.formats.read import load_tokenizer
from edgemoe.memory import RESERVE, automatic_budget, format_size, used_now
from edgemoe.processors import usable_processors
from edgemoe.quantize.allocation import allocate, super_experts
from edgemoe.quantize.calibration import SHIPPED, WINDOW, Statistics, windows
from edgemoe.quantize.layerwise import LayerwiseModel, original_index, temporary_array
from edgemoe.quantize.nested import Floats, Hessian, Nested, check_bits, quantize
from edgemoe.quantize.quality import Reference, measure, most_runs
from edgemoe.source import SourceModel, read_matrix
from edgemoe.text.tokenizer import check_vocabulary

# Tokens that are looked at to find super experts, before anything is quantized.
_SCOUTED = 4096
# A layer's experts take as long to quantize as so many tokens take to go through it; what is done is told in these.
_TOKENS_PER_LAYER = 6 * 65536


@dataclass(frozen=True, slots=True)
class NestedOptions:
    """levels: ascending widths of at most 8 bits. calibration: a text (None: the shipped one); calibrate: whether there
    is any calibration. tokens: of the calibration text. target_bits: mean bits per weight of a layer's experts, all
    counted; None for all levels of every expert. quality_text: None for no measurement. quality_tokens: of it. memory:
    bytes, None for automatic; threads: None for one per processor."""

    levels: tuple[int, ...] = (2, 3, 4)
    calibration: Path | None = None
    calibrate: bool = True
    tokens: int = 65536
    target_bits: float | None = None
    quality_text: Path | None = None
    quality_tokens: int = 8192
    memory: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        try:
            check_bits(self.levels)
        except ValueError as error:
            raise OptionError(str(error)) from None
        if self.target_bits is not None and not self.calibrate:
            raise OptionError("bits per weight cannot be distributed over experts without calibration")

    @property
    def text(self) -> Path:
        return SHIPPED if self.calibration is None else self.calibration

    def provenance(self) -> dict[str, Any]:
        """What the bytes of the pack depend on. Raises OptionError for a text that cannot be read."""
        facts: dict[str, Any] = {"levels": list(self.levels)}
        if self.calibrate:
            try:
                digest = hashlib.sha256(self.text.read_bytes()).hexdigest()[:16]
            except OSError as error:
                raise OptionError(f"{self.text}: {error.strerror}") from None
            facts |= {"calibration": self.text.name, "calibration_sha256": digest, "calibration_tokens": self.tokens}
        if self.target_bits is not None:
            facts["target_bits"] = self.target_bits
        return facts


def level_layouts(bits: Sequence[int]) -> list[str]:
    """Layout of each level: level 0 whole, later ones the bits they add."""
    later = (f"refine{width - below}" for below, width in itertools.pairwise(bits))
    return [f"base{bits[0]}r{len(bits) - 1}", *later]


class NestedExperts:
    """The experts' sections of a conversion. path: of the source; work: a folder for temporary files."""

    def __init__(self, path: Path, model: SourceModel, options: NestedOptions, work: Path) -> None:
        self._path = path
        self._model = model
        self._options = options
        self._work = work
        self._threads = options.threads or usable_processors()
        self._layouts = level_layouts(options.levels)
        self._super_experts: set[tuple[int, int]] = set()

    # -- the plan ---------------------------------------------------------------------------------------------------

    def levels(self, layer: int) -> tuple[Level, ...]:
        levels = []
        for bits, layout in zip(self._options.levels, self._layouts, strict=True):
            parts, offset = {}, 0
            for part in PARTS:
                shape = self._model.spec.expert_tensors(layer)[part]
                parts[part] = Part(layout, 0, offset, shape)
                offset = align(offset + packed_size(layout, *shape), ALIGNMENT)
            levels.append(Level(bits, parts))
        return tuple(levels)

    def section_sizes(self, layer: int) -> list[int]:
        """Bytes of each level's section in the file."""
        lasts = [level.parts[PARTS[-1]] for level in self.levels(layer)]
        return [align(part.offset + packed_size(part.layout, *part.shape), BLOCK) for part in lasts]

    def size(self) -> int:
        """Bytes of all sections, at most."""
        return sum(self._model.spec.layers[layer].experts * sum(self.section_sizes(layer)) for layer in self.routed())

    def temporary_size(self) -> int:
        """Bytes of the temporary files, at most."""
        spec, options = self._model.spec, self._options
        calibration = options.tokens + WINDOW if options.calibrate else 0
        measured = options.quality_tokens + WINDOW if options.quality_text is not None else 0
        seen = max(spec.layers[layer].top_k * spec.layers[layer].ffn_dim for layer in self.routed())
        size = 4 * (calibration * (2 * spec.hidden_size + seen) + measured * (spec.hidden_size + spec.vocab_size // 2))
        if options.target_bits is not None:
            size += max(spec.layers[layer].experts * sum(self.section_sizes(layer)) for layer in self.routed())
        return size

    def unwritten(self) -> int:
        """What the passes of texts through the model count as, beside the sections' bytes, at most."""
        options = self._options
        calibration = options.tokens + WINDOW if options.calibrate else 0
        measured = options.quality_tokens + WINDOW if options.quality_text is not None else 0
        scouted = min(calibration, _SCOUTED) if options.target_bits is not None else 0
        tokens = scouted + calibration + (1 + most_runs(len(options.levels))) * measured
        return int(self._pass_bytes() * tokens * len(self._model.spec.layers))

    def _pass_bytes(self) -> float:
        """Bytes of sections that take as long to make as a token takes to go through a layer."""
        return self.size() / len(self._model.spec.layers) / _TOKENS_PER_LAYER

    def routed(self) -> list[int]:
        return [number for number, layer in enumerate(self._model.spec.layers) if layer.experts]

    # -- the work ---------------------------------------------------------------------------------------------------

    def write(
        self,
        writer: PackWriter,
        contents: PackContents,
        first: int,
        report: Callable[[int], None],
    ) -> None:
        """Adds the sections of all experts, from number `first` on, except those that the writer has; fills
        `contents.experts`, and `contents.quality` where it is to be measured.

        report: called after each section, each window of a text that went through a layer and each expert that cannot
        be written yet, with what has been done so far beside writing: `unwritten()` in the end, or less, and the bytes
        of levels that were quantized but are not kept, or not yet written.
        """
        spec, options = self._model.spec, self._options
        self._next = first
        self._report = report
        self._beside = 0.0
        if not options.calibrate and options.quality_text is None:
            for number in self.routed():
                self._write_layer(number, None, writer, contents)
            return
        pass_bytes = self._pass_bytes()
        window = min(WINDOW, spec.context)
        tokenizer = load_tokenizer(self._path)
        check_vocabulary(tokenizer, spec)
        calibration = held_out = np.zeros((0, window), np.int32)
        if options.calibrate:
            calibration = windows(tokenizer, options.text, window, options.tokens)
        if options.quality_text is not None:
            held_out = windows(tokenizer, options.quality_text, window, options.quality_tokens)
        original = LayerwiseModel(
            original_index(self._path, self._work),
            window,
            threads=self._threads,
            memory=self._free(),
            work=self._work,
            report=lambda tokens: self._advance(tokens * pass_bytes),
        )
        if options.target_bits is not None and self.routed()[-1] not in writer.notes:
            self._super_experts = self._find_super_experts(original, calibration)
        tokens = np.concatenate([calibration, held_out])
        residual = temporary_array(self._work, (*tokens.shape, spec.hidden_size), np.float32)
        reference = Reference(held_out, spec.vocab_size, self._work)
        for number, layer in enumerate(spec.layers):
            statistics = Statistics.empty(layer, spec.hidden_size, calibration.size, self._work)
            observe = statistics.observe if layer.experts else None
            for logits in original.run(number, tokens, residual, observe, reference.positions, len(calibration)):
                reference.add(logits)
            if layer.experts:
                self._write_layer(number, statistics if options.calibrate else None, writer, contents)
        if options.quality_text is not None:
            index = writer.unfinished(contents)
            contents.quality = measure(
                lambda quality: LayerwiseModel(
                    index,
                    window,
                    threads=self._threads,
                    memory=self._free(),
                    work=self._work,
                    quality=quality,
                    report=lambda tokens: self._advance(tokens * pass_bytes),
                ),
                contents.experts,
                reference,
                options.quality_text.name,
            )

    def _advance(self, work: float = 0.0) -> None:
        """So many bytes' worth more has been done beside writing."""
        self._beside += work
        self._report(int(self._beside))

    def _free(self) -> int:
        """Bytes that may still be used."""
        limit = automatic_budget() if self._options.memory is None else self._options.memory
        return limit - used_now() - RESERVE

    def _find_super_experts(self, original: LayerwiseModel, calibration: npt.NDArray[np.int32]) -> set[tuple[int, int]]:
        spec = self._model.spec
        tokens = calibration[: -(-_SCOUTED // calibration.shape[1])]
        residual = temporary_array(self._work, (*tokens.shape, spec.hidden_size), np.float32)
        peaks: list[npt.NDArray[np.float64] | None] = []
        for number, layer in enumerate(spec.layers):
            statistics = Statistics.empty(layer, spec.hidden_size, tokens.size, self._work)
            for _ in original.run(number, tokens, residual, statistics.observe if layer.experts else None):
                pass
            found = np.zeros(layer.experts)
            np.maximum.at(found, statistics.picks, statistics.peaks)
            peaks.append(found if layer.experts else None)
        return super_experts(peaks)

    def _write_layer(
        self,
        layer: int,
        statistics: Statistics | None,
        writer: PackWriter,
        contents: PackContents,
    ) -> None:
        sizes = self.section_sizes(layer)
        experts = self._model.spec.layers[layer].experts
        with contextlib.ExitStack() as stack:
            spool: _Spool | None = None
            kept = writer.notes.get(layer)
            if kept is None and self._options.target_bits is not None:
                assert statistics is not None
                spool = stack.enter_context(_Spool(self._work))
                errors = []
                for packed, lost in self.quantized(layer, statistics, range(experts)):
                    spool.add(packed)
                    errors.append(lost)
                    self._advance(sum(sizes))
                kept = self._allocate(layer, np.array(errors))
            elif kept is None:
                kept = [len(self._options.levels)] * experts
            if layer not in writer.notes:
                writer.note(layer, kept)
            if spool is None:
                self._advance(sum(sum(sizes[levels:]) for levels in kept))
            sections = []
            for levels in kept:
                sections.append(tuple(range(self._next, self._next + levels)))
                self._next += levels
            contents.experts[layer] = ExpertLayer(self.levels(layer), tuple(sections))
            missing = [expert for expert in range(experts) if sections[expert][-1] >= writer.done]
            if not missing:
                return
            made = (
                (spool.read(expert) for expert in missing)
                if spool is not None
                else (packed for packed, _ in self.quantized(layer, statistics, missing))
            )
            for expert, packed in zip(missing, made, strict=True):
                for number, data, size in zip(sections[expert], packed, sizes, strict=False):
                    if number == writer.done:
                        writer.add([data])
                        self._advance(-size if spool is not None else 0)

    def _allocate(self, layer: int, errors: npt.NDArray[np.float64]) -> list[int]:
        """How many levels each expert keeps."""
        assert self._options.target_bits is not None
        sizes = np.cumsum(self.section_sizes(layer)).tolist()
        weights = sum(rows * columns for rows, columns in self._model.spec.expert_tensors(layer).values())
        budget = int(self._options.target_bits * weights * len(errors) / 8)
        top = len(sizes) - 1
        least = [top if (layer, expert) in self._super_experts else 0 for expert in range(len(errors))]
        try:
            return [level + 1 for level in allocate(errors, sizes, budget, least)]
        except ValueError:
            smallest = sum(sizes[level] for level in least) * 8 / weights / len(errors)
            raise OptionError(
                f"{self._options.target_bits} bits per weight are too few for layer {layer}: "
                f"{smallest:.3f} is the least"
            ) from None

    def quantized(
        self, layer: int, statistics: Statistics | None, experts: Sequence[int]
    ) -> Iterator[tuple[list[Bytes], list[float]]]:
        """(the bytes of every level, the error of every level) of these experts, in order."""
        means: dict[str, Floats] = {}
        if statistics is not None:
            everything = statistics.all_experts()
            means = {part: everything.hessian(part) for part in ("inputs", "hidden")}
        pending: deque[Future[tuple[list[Bytes], list[float]]]] = deque()
        with ThreadPoolExecutor(self._workers(layer)) as pool:
            try:
                for expert in experts:
                    pending.append(pool.submit(self._quantize_expert, layer, expert, statistics, means))
                    if len(pending) > self._workers(layer):
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _workers(self, layer: int) -> int:
        """Experts quantized at a time: as many as there are threads and memory for."""
        columns = max(self._model.spec.hidden_size, self._model.spec.layers[layer].ffn_dim)
        weights = sum(rows * size for rows, size in self._model.spec.expert_tensors(layer).values())
        # While the Hessian is factorized, which NumPy does in float64: eight times its size, and the weights. Later it,
        # what it was made of and its feedback; weights, their products with it, codes, the errors of every level.
        # Before that a batch of tokens.
        square = columns * columns
        most = max(8 * square + 2 * weights, 4 * square + (5 + len(self._options.levels)) * weights)
        each = 4 * (most + 3 * 2048 * columns)
        free = self._free() - 2 * 4 * columns * columns
        if free < each:
            raise MemoryBudgetError(
                f"{self._path}: an expert of layer {layer} takes {format_size(each)} to quantize, "
                f"{format_size(max(free, 0))} are left (-M)"
            )
        return min(self._threads, free // each)

    def _quantize_expert(
        self, layer: int, expert: int, statistics: Statistics | None, means: dict[str, Floats]
    ) -> tuple[list[Bytes], list[float]]:
        spec, bits = self._model.spec, self._options.levels
        shapes, ffn = spec.expert_tensors(layer), spec.layers[layer].ffn_dim
        weights = {part: self._weights(f"layers.{layer}.experts.{expert}.{part}", shapes[part]) for part in PARTS}
        gate_up = np.concatenate([weights["gate"], weights["up"]])
        seen = statistics.expert(expert) if statistics is not None else None
        errors = np.zeros(len(bits))
        parts: dict[str, Nested] = {}
        for name, matrix in (("inputs", gate_up), ("hidden", weights["down"])):
            mixed = seen.mixed_hessian(name, means[name]) if seen is not None else None
            hessian = Hessian(mixed, matrix.shape[1])
            try:
                made = quantize(matrix, hessian, bits)
            except ValueError as error:
                raise SourceError(f"{self._path}: expert {expert} of layer {layer}: {error}") from None
            if self._options.target_bits is not None and mixed is not None:
                errors += _relative_errors(matrix, made, mixed)
            if name == "inputs":
                parts = {"gate": made.rows(0, ffn), "up": made.rows(ffn, 2 * ffn)}
            else:
                parts["down"] = made
        energy = seen.output_energy if seen is not None else 0.0
        packed: list[Bytes] = []
        for level, layout in enumerate(self._layouts):
            data = bytearray()
            for part in PARTS:
                made = parts[part]
                data += bytes(-len(data) % ALIGNMENT)
                data += pack_level(layout, made.level_codes(level), made.level_parameters(level)).tobytes()
                assert made.codes.shape[0] == shapes[part][0]
            packed.append(bytes(data))
        return packed, (errors * energy).tolist()

    def _weights(self, name: str, shape: tuple[int, int]) -> Floats:
        return read_matrix(self._model.folder, name, self._model.sources[name], shape)


def _relative_errors(weights: Floats, made: Nested, hessian: Floats) -> npt.NDArray[np.float64]:
    """Of each level: the squared error of the product relative to its square, for inputs of this Hessian."""
    signal = float(np.einsum("ij,ij->", weights @ hessian, weights, dtype=np.float64))
    errors = []
    for level in range(len(made.bits)):
        lost = made.weights(level, weights.shape[1]) - weights
        errors.append(float(np.einsum("ij,ij->", lost @ hessian, lost, dtype=np.float64)))
    return np.array(errors) / signal if signal > 0 else np.zeros(len(errors))


class _Spool:
    """Quantized experts on their way, in a temporary file: the levels that are kept are known when all are made."""

    def __init__(self, work: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=work)  # noqa: SIM115
        self._places: list[list[tuple[int, int]]] = []

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, packed: Sequence[Bytes]) -> None:
        self._places.append([])
        for data in packed:
            self._places[-1].append((self._file.tell(), len(data)))
            self._file.write(data)

    def read(self, expert: int) -> list[Bytes]:
        packed: list[Bytes] = []
        for offset, length in self._places[expert]:
            self._file.seek(offset)
            packed.append(self._file.read(length))
        return packed
