"""The sampling options that a model may come with defaults for, and what files call them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingName:
    """option: a field of SamplingOptions. config: its name in generation_config.json and in the index of a pack. gguf:
    its key in GGUF files after "general.sampling."; empty where they have none."""

    option: str
    config: str
    gguf: str = ""


SAMPLING_NAMES = (
    SamplingName("temperature", "temperature", "temp"),
    SamplingName("top_k", "top_k", "top_k"),
    SamplingName("top_p", "top_p", "top_p"),
    SamplingName("min_p", "min_p", "min_p"),
    SamplingName("typical_p", "typical_p"),
    SamplingName("repeat_penalty", "repetition_penalty", "penalty_repeat"),
    SamplingName("presence_penalty", "presence_penalty"),
    SamplingName("frequency_penalty", "frequency_penalty"),
)
