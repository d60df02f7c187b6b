"""Programs of others that judge servers: llm-comply's checks of three protocols."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from forced import call, forced
from scripted import serving

import edgemoe
from edgemoe.text.named_templates import NAMED_TEMPLATES

# What it asks for and does not get: pictures; and a refusal where no model is named: there is one, which answers.
DELIBERATE = {
    "openai-chat": {"chat-image-input", "chat-error-handling"},
    "open-responses": {"image-input", "error-handling"},
    "anthropic": {"anth-image-input"},
}


def script(prompt: str) -> str:
    if "get_weather" in prompt:
        return call("get_weather", '{"location": "San Francisco"}')
    return "Hello there, friend."


@pytest.fixture(scope="module")
def forced_url() -> Iterator[str]:
    with edgemoe.load(context=2048) as model:
        model.tokenizer.use_chat_template(NAMED_TEMPLATES["chatml"])
        with forced(script), serving(model) as url:
            yield url


@pytest.mark.parametrize("protocol", sorted(DELIBERATE))
def test_llm_comply_finds_nothing(forced_url: str, protocol: str) -> None:
    program = shutil.which("llm-comply")
    if program is None:
        pytest.skip("llm-comply is not installed")
    command = [program, "-u", f"{forced_url}/v1", "-k", "none", "-m", "tiny", "--format", protocol, "--json"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    results = {result["id"]: result for result in json.loads(said.stdout)["results"]}
    assert len(results) >= 9
    failed = {name: result["errors"] for name, result in results.items() if result["status"] == "failed"}
    assert failed.keys() == DELIBERATE[protocol], json.dumps(failed, indent=1)
