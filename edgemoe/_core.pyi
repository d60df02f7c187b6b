"""The C++ core. `edgemoe.engine` is the user of `Engine`; `kernels` is there for tests, `profiling` for
`edgemoe.profiling` and `edgemoe.machine`."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from edgemoe.formats.index import ModelIndex
from edgemoe.options import EngineOptions, Quality

__version__: str
kernels: ModuleType
profiling: ModuleType

def crc32c(buffer: Buffer, crc: int = 0) -> int: ...
def plan(index: ModelIndex, options: EngineOptions) -> MemoryPlan:
    """What an engine with these options would take. Raises as `Engine`."""

class MemoryPlan:
    """Sizes in bytes."""

    @property
    def dense(self) -> int:
        """Weights that are always in memory."""

    @property
    def state(self) -> int:
        """Of all `sequences`, of together `positions` positions."""

    @property
    def scratch(self) -> int:
        """Activations of one chunk."""

    @property
    def slot(self) -> int:
        """Memory of one expert, the largest with all its levels."""

    @property
    def experts(self) -> int:
        """Slots that hold all experts of the model: more are never used."""

    @property
    def minimum_slots(self) -> int:
        """Fewer than these do not hold what one token works with in a layer."""

    @property
    def device_dense(self) -> int:
        """What a device has of `dense`, and `dense` has not; so for the others."""

    @property
    def device_state(self) -> int: ...
    @property
    def device_scratch(self) -> int: ...
    @property
    def device_slot(self) -> int:
        """Memory of one expert there."""

    @property
    def device_experts(self) -> int:
        """Slots there that hold all experts of its layers."""

class EngineCounters:
    """What an engine has done since it was made, or between two times."""

    def __init__(self) -> None:
        """Nothing."""

    @property
    def tokens(self) -> int: ...
    @property
    def seconds(self) -> float:
        """In forward passes, waiting included."""

    @property
    def expert_uses(self) -> int:
        """Pairs of a token and an expert."""

    @property
    def expert_bits(self) -> int:
        """The stored widths of the levels that they worked at, added up."""

    @property
    def device_hits(self) -> int:
        """Of expert_uses, those of experts that lay in a device's memory."""

    @property
    def device_uploads(self) -> int:
        """Experts, or further levels of some, that were brought there."""

    @property
    def device_upload_bytes(self) -> int: ...
    @property
    def experts_requested(self) -> int: ...
    @property
    def experts_hit(self) -> int:
        """All levels that were needed were in memory."""

    @property
    def sections_read(self) -> int:
        """Whole and undamaged."""

    @property
    def bytes_read(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def prefetch_issued(self) -> int: ...
    @property
    def prefetch_used(self) -> int: ...
    @property
    def prefetch_late(self) -> int: ...
    @property
    def prefetch_wasted(self) -> int: ...
    @property
    def stall_seconds(self) -> float: ...
    @property
    def read_seconds(self) -> float:
        """At least one read was under way."""

    def __add__(self, other: EngineCounters) -> EngineCounters: ...
    def __sub__(self, other: EngineCounters) -> EngineCounters: ...

class LayerRecord:
    """What the experts of a layer saw and made; of a dense layer, `inputs` is empty and `top_k` is 0."""

    @property
    def inputs(self) -> NDArray[np.float32]:
        """[tokens, hidden] what the experts multiply."""

    @property
    def picks(self) -> NDArray[np.int32]:
        """[tokens, top_k] in the order of the choice."""

    @property
    def weights(self) -> NDArray[np.float32]:
        """[tokens, top_k]"""

    @property
    def hidden(self) -> NDArray[np.float32]:
        """[tokens, top_k, ffn] what the experts' last matrix multiplies."""

    @property
    def peaks(self) -> NDArray[np.float32]:
        """[tokens, top_k] largest magnitude in an expert's output."""

    @property
    def energies(self) -> NDArray[np.float32]:
        """[tokens, top_k] sum of the squares of an expert's output."""

    @property
    def logits(self) -> NDArray[np.float32]:
        """[wanted, vocab] after the last layer."""

class RoutingRecord:
    """What the routers chose, token by token: [tokens, picks of all layers side by side]."""

    @property
    def picks(self) -> NDArray[np.uint16]:
        """Each layer's in the order of the choice."""

    @property
    def weights(self) -> NDArray[np.float32]: ...
    @property
    def predicted(self) -> NDArray[np.uint16]:
        """What the look-ahead expected, 65535 where it does not look."""

class Cancelled(Exception):
    """Raised by a pass whose `Cancel` was set."""

class Cancel:
    """Ends a pass between two layers; it stays set."""

    def __init__(self) -> None: ...
    def set(self) -> None:
        """From any thread."""

    def is_set(self) -> bool: ...

class Device:
    """A device by itself, for tests. Addresses are numbers; 0 is none. Operations are computed in their order; those of
    an emulated device not before something is read or waited for, unless it is `eager`.

    order, seed, eager, memory: of an emulated one. In which order warps and lanes take turns, and bytes that it has.
    library, image: of CUDA. The driver's, and the kernels' PTX if it is not the package's.

    Raises DeviceError for what a device refuses, and if it failed; DeviceMemoryError.
    """

    def __init__(
        self,
        kind: Literal["emulated", "cuda"],
        *,
        order: Literal["ascending", "descending", "shuffled"] = "ascending",
        seed: int = 0,
        eager: bool = False,
        memory: int = ...,
        library: str = "libcuda.so.1",
        image: bytes | None = None,
    ) -> None: ...
    def allocate(self, nbytes: int) -> int: ...
    def release(self, address: int) -> None: ...
    def write(self, address: int, data: Buffer | NDArray[Any]) -> None: ...
    def read(self, address: int, nbytes: int) -> bytes: ...
    def copy(self, to: int, from_: int, nbytes: int) -> None: ...
    def launch(self, name: str, groups: int, arguments: Sequence[int | bytes]) -> None:
        """Arguments: addresses, or the bytes of a number or struct (native/gpu/kernel_list.h)."""

    def launches(self, name: str, groups: int, arguments: Sequence[Sequence[int | bytes]], times: int) -> None:
        """So many, with each list of arguments in turn: for measuring."""

    def upload(self, address: int, data: Buffer | NDArray[Any]) -> int:
        """Beside the other operations. Returns its number."""

    def done(self, upload: int) -> bool: ...
    def wait(self, upload: int | None = None) -> None:
        """For an upload, or for all that is not one."""

    def pin(self, data: Buffer | NDArray[Any]) -> bool:
        """Makes uploads from there faster; false where the device cannot."""

    def unpin(self, data: Buffer | NDArray[Any]) -> None: ...
    def facts(self) -> dict[str, str | int | bool]:
        """name, memory, available, unified, driver"""

class Engine:
    def __init__(self, index: ModelIndex, options: EngineOptions, device: Device | None = None) -> None:
        """Raises TypeError for a field of these dataclasses that is missing, unknown or of another type than the
        engine reads; ValueError for what the engine cannot compute; ReadError; DeviceError."""

    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequence_ids: NDArray[np.int32],
        wanted: NDArray[np.int32],
        cancel: Cancel | None = None,
        qualities: Sequence[Quality] = (),
        quality: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.float32]:
        """Logits [wanted, vocab]. Row i is computed at qualities[quality[i]], or at qualities[0] without `quality`;
        without both at the engine's."""

    def forward_layer(
        self,
        layer: int,
        tokens: NDArray[np.int32],
        residual: NDArray[np.float32],
        embed: bool,
        wanted: NDArray[np.int32],
    ) -> LayerRecord:
        """Takes the tokens of sequence 0 through one layer; residual: [tokens, hidden], changed in place. The sequence
        is empty before and afterwards."""

    def add_sequence(self) -> int: ...
    def fork(self, id: int, length: int) -> int: ...
    def free_positions(self) -> int: ...
    def held_positions(self, id: int) -> int: ...
    def remove_sequence(self, id: int) -> None: ...
    def length(self, id: int) -> int: ...
    def truncate(self, id: int, length: int) -> None: ...
    def mark(self, id: int) -> None: ...
    def marked(self, id: int) -> int: ...
    def has_constants(self, id: int) -> bool: ...
    def snapshot(self, id: int) -> NDArray[np.uint8]: ...
    def restore(self, id: int, source: Buffer | NDArray[np.uint8]) -> None: ...
    def record_routing(self, on: bool) -> None: ...
    def take_routing(self) -> RoutingRecord: ...
    def counters(self) -> EngineCounters: ...
    def residency(self) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]: ...
    @property
    def isa(self) -> str: ...
    @property
    def direct_io(self) -> bool: ...
