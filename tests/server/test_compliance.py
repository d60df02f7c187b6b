"""Programs of others that judge servers, or are their clients.

EDGEMOE_CLIENTS_PYTHON names a Python with langchain-openai and llama-index-llms-openai-like, which are skipped without.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

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
    if "Which whale?" in prompt:
        return '{"whale": "blue"}'
    if "get_weather" in prompt and "rain" not in prompt:
        return call("get_weather", '{"location": "San Francisco"}')
    return "Hello there, friend."


@pytest.fixture(scope="module")
def forced_url() -> Iterator[str]:
    with edgemoe.load(context=2048) as model:
        model.tokenizer.use_chat_template(NAMED_TEMPLATES["chatml"])
        with forced(script), serving(model) as url:
            yield url


@pytest.mark.slow
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


def test_clients_of_langchain_and_llamaindex(forced_url: str) -> None:
    python = os.environ.get("EDGEMOE_CLIENTS_PYTHON")
    if python is None:
        pytest.skip("EDGEMOE_CLIENTS_PYTHON is not set")
    program = str(Path(__file__).with_name("other_clients.py"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run([python, program, forced_url], capture_output=True, text=True, timeout=180, env=environment)
    assert said.stdout.split() == ["langchain", "llamaindex"], said.stderr[-4000:]


@pytest.mark.slow
def test_schemathesis_finds_nothing(bundled: edgemoe.Model, tmp_path: Path) -> None:
    """Requests that the description allows, and such that it does not: no server error, and no answer that is not
    described."""
    program = shutil.which("schemathesis")
    if program is None:
        pytest.skip("schemathesis is not installed")
    checks = (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
    with serving(bundled, max_tokens=4) as url:
        command = [program, "run", f"{url}/openapi.json", "--checks", ",".join(checks), "--phases", "fuzzing"]
        command += ["-n", "40", "--seed", "1", "--continue-on-failure", "--no-color"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert said.returncode == 0, said.stdout
    (count,) = re.findall(r"(\d+) generated, \1 passed", said.stdout)
    assert int(count) >= 300
