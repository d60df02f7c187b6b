"""The `.emoe` pack (docs/format.md): writing one section after the other, and reading with nothing taken on trust."""

from edgemoe.formats.pack.chunks import Bytes
from edgemoe.formats.pack.contents import Blob, PackContents, consecutive_sections
from edgemoe.formats.pack.header import ALIGNMENT, BLOCK, MAX_BLOB, MAX_INDEX, MAX_SECTION, align
from edgemoe.formats.pack.journal import partial_path
from edgemoe.formats.pack.reader import Pack
from edgemoe.formats.pack.writer import PackWriter

__all__ = [
    "ALIGNMENT",
    "BLOCK",
    "MAX_BLOB",
    "MAX_INDEX",
    "MAX_SECTION",
    "Blob",
    "Bytes",
    "Pack",
    "PackContents",
    "PackWriter",
    "align",
    "consecutive_sections",
    "partial_path",
]
