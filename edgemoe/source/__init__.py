"""A model's original weights, a Hugging Face folder or a GGUF file: the model that they are, and its tensors in the
types that they have there, some rows at a time."""

from edgemoe.source.model import GgufTensors, SourceModel, TensorFiles, checked_dtype
from edgemoe.source.tensors import SourceTensor, copied_tensor, float_rows, packed_rows, read_matrix

__all__ = [
    "GgufTensors",
    "SourceModel",
    "SourceTensor",
    "TensorFiles",
    "checked_dtype",
    "copied_tensor",
    "float_rows",
    "packed_rows",
    "read_matrix",
]
