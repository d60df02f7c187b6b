from __future__ import annotations

import pytest
from small_tokenizers import byte_level_backend, sentencepiece_backend, wordpiece_backend, wrap

from edgemoe.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    config = {"bos_token": "<|end|>", "eos_token": {"content": "<|end|>"}, "add_bos_token": True}
    return wrap(byte_level_backend(), config, eos_token_ids=[2])


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return wrap(sentencepiece_backend(), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    return wrap(wordpiece_backend())
