"""A source, a Hugging Face folder or a GGUF file, becomes an `.emoe` pack."""

from edgemoe.convert.conversion import convert, estimate_size, planned_index, requantized_types

__all__ = ["convert", "estimate_size", "planned_index", "requantized_types"]
