"""Makes the bytes of a planned pack's sections."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from edgemoe.convert.plan import ConversionPlan, PlannedSection
from edgemoe.errors import SourceError
from edgemoe.formats.layouts import QUANTIZED, pack
from edgemoe.formats.pack import Bytes
from edgemoe.processors import usable_processors
from edgemoe.quantize.rtn import quantize
from edgemoe.source import SourceTensor, TensorFiles, float_rows, packed_rows

# Bytes of finished expert sections that may wait for the disk.
_WAITING_BYTES = 256 << 20


def make_sections(plan: ConversionPlan, first: int) -> Generator[Iterable[Bytes], None, None]:
    """The chunks of every section from number `first` on.

    Large sections are made while they are written; small ones, the experts, by several threads ahead of the disk. The
    order and the bytes are the same.
    """
    folder, sections = plan.model.folder, plan.sections
    pending: deque[Future[list[Bytes]]] = deque()
    waiting = 0
    threads = min(8, usable_processors())
    with ThreadPoolExecutor(threads) as pool:
        try:
            ahead = first
            for number in range(first, len(sections)):
                while (
                    ahead < len(sections)
                    and sections[ahead].length <= _WAITING_BYTES // 4
                    and len(pending) < 2 * threads
                    and waiting < _WAITING_BYTES
                ):
                    pending.append(pool.submit(_finished, folder, sections[ahead]))
                    waiting += sections[ahead].length
                    ahead += 1
                if ahead > number:
                    yield pending.popleft().result()
                    waiting -= sections[number].length
                else:
                    yield _chunks(folder, sections[number])
                    ahead = number + 1
        finally:
            for future in pending:
                future.cancel()


def _finished(folder: TensorFiles, section: PlannedSection) -> list[Bytes]:
    return list(_chunks(folder, section))


def _chunks(folder: TensorFiles, section: PlannedSection) -> Iterator[Bytes]:
    if section.blob:
        yield section.blob
    end = 0
    for planned in section.tensors:
        yield bytes(planned.offset - end)
        if planned.layout in QUANTIZED:
            yield from _quantized_rows(folder, planned.tensor, planned.layout)
        else:
            yield from packed_rows(folder, planned.tensor, planned.layout)
        end = planned.end


def _quantized_rows(folder: TensorFiles, tensor: SourceTensor, layout: str) -> Iterator[Bytes]:
    for (start, end), values in float_rows(folder, tensor):
        try:
            codes, scales, offsets = quantize(values, QUANTIZED[layout])
        except ValueError as error:
            raise SourceError(f"{folder.folder}: tensor {tensor.source.name}, rows {start}-{end}: {error}") from None
        yield pack(layout, codes, scales, offsets).data
