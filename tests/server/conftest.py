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


@pytest.fixture(scope="session")
def script_servers(bundled: edgemoe.Model) -> Iterator[tuple[ScriptedModel, str, str]]:
    """(the scripted model, URL of a server that begins its streams at once, and of one that waits for something)."""
    model = ScriptedModel(bundled)
    with (
        serving(model, keepalive_seconds=0.05, prompt_seconds=0.05) as url,
        serving(model, prompt_seconds=20) as patient_url,
    ):
        yield model, url, patient_url


@pytest.fixture
def scripted(script_servers: tuple[ScriptedModel, str, str]) -> ScriptedModel:
    """With nothing of what another test wanted."""
    script_servers[0].reset()
    return script_servers[0]


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
def scripted_url(script_servers: tuple[ScriptedModel, str, str]) -> str:
    return script_servers[1]


@pytest.fixture
def patient_url(script_servers: tuple[ScriptedModel, str, str]) -> str:
    return script_servers[2]


@pytest.fixture
def scripted_http(scripted_url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=scripted_url, timeout=60) as client:
        yield client
