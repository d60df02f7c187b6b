"""Servers that tests talk to."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from scripted import ScriptedModel, serving

import edgemoe
from edgemoe.text.named_templates import NAMED_TEMPLATES


@pytest.fixture(scope="session")
def bundled() -> Iterator[edgemoe.Model]:
    """The bundled model, with a template for conversations."""
    with edgemoe.load(context=512) as model:
        model.tokenizer.use_chat_template(NAMED_TEMPLATES["chatml"])
        yield model


@pytest.fixture
def scripted(bundled: edgemoe.Model) -> ScriptedModel:
    return ScriptedModel(bundled)


@pytest.fixture(scope="session")
def url(bundled: edgemoe.Model) -> Iterator[str]:
    """A server of the bundled model."""
    with serving(bundled, max_tokens=64) as address:
        yield address


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def scripted_url(scripted: ScriptedModel) -> Iterator[str]:
    with serving(scripted, keepalive_seconds=0.05, prompt_seconds=0.05) as address:
        yield address


@pytest.fixture
def scripted_http(scripted_url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=scripted_url, timeout=60) as client:
        yield client
