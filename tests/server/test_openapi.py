"""The description of the server and the server say the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

import edgemoe
from edgemoe.protocols import chat_completions
from edgemoe.server.app import create_app
from edgemoe.server.settings import ServerSettings


@pytest.fixture(scope="module")
def described(http: httpx2.Client) -> dict[str, Any]:
    answer = http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    document: dict[str, Any] = answer.json()
    return document


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_every_path_is_described(described: dict[str, Any], bundled: edgemoe.Model) -> None:
    app: Any = create_app(bundled, ServerSettings(model_name="x"))
    served = {(route.path.replace(":path", ""), method) for route in app.routes for method in route.methods}
    told = {(path, method.upper()) for path, item in described["paths"].items() for method in item}
    assert {pair for pair in served if pair[1] != "HEAD"} == told


def test_what_is_referred_to_is_there(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    used = set(references(described))
    assert used == {f"#/components/schemas/{name}" for name in schemas}


def test_every_field_of_chat_completions_is_described(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    own = schemas["ChatRequest"]["allOf"][1]["properties"]
    assert {*own, *schemas["Sampling"]["properties"]} == set(chat_completions.FIELDS)


def test_a_name_with_a_line_end_is_no_path(http: httpx2.Client, described: dict[str, Any]) -> None:
    answer = http.get("/v1/models/a%0Ab")
    assert str(answer.status_code) in described["paths"]["/v1/models/{name}"]["get"]["responses"]
