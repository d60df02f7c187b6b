"""What a server tells of itself."""

from __future__ import annotations

import base64
import re
from typing import Any

import anthropic
import httpx2
import numpy as np
import pytest
from scripted import serving

import edgemoe


def test_metrics_are_prometheus_text(bundled: edgemoe.Model) -> None:
    with serving(bundled) as url, httpx2.Client(base_url=url, timeout=60) as client:
        client.post("/v1/completions", json={"prompt": "The sea", "max_tokens": 5, "ignore_eos": True})
        client.get("/nothing/1")
        client.get("/nothing/2")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    kinds = {}
    for line in answer.text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("#"):
            sample = re.fullmatch(r'([a-z_]+(?:\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})?) (\S+)', line)
            assert sample is not None, line
            values[sample[1]] = float(sample[2])
            assert any(sample[1].startswith(name) for name in kinds)
    assert values['edgemoe_requests_total{path="/v1/completions",status="200"}'] == 1
    assert values['edgemoe_requests_total{path="other",status="404"}'] == 2
    assert values['edgemoe_answers_total{reason="length"}'] == 1
    assert values["edgemoe_generated_tokens_total"] == 5
    assert values["edgemoe_ttft_seconds_count"] == values['edgemoe_ttft_seconds_bucket{le="+Inf"}'] == 1
    assert values["edgemoe_answers_running"] == 0
    assert values["edgemoe_tokens_per_second"] > 0
    assert values["edgemoe_expert_requests_total"] > 0
    assert values["edgemoe_memory_limit_bytes"] == bundled.budget.limit


def test_the_engine_tells_what_the_page_shows(http: httpx2.Client, bundled: edgemoe.Model) -> None:
    report = http.get("/engine").json()
    assert report["layers"] == len(bundled.spec.layers)
    assert report["experts"] == 32
    assert report["memory"]["limit"] == bundled.budget.limit
    assert {"hit_rate", "bytes_read", "stall_ms", "generated_tokens"} <= report["counters"].keys()


def test_a_device_is_told(http: httpx2.Client) -> None:
    assert http.get("/engine").json()["device"] is None
    assert "edgemoe_device" not in http.get("/metrics").text
    with (
        edgemoe.load(context=128, threads=1, gpu="emulated", gpu_layers=1) as model,
        serving(model) as url,
        httpx2.Client(base_url=url, timeout=60) as client,
    ):
        client.post("/v1/completions", json={"prompt": "The sea", "max_tokens": 3, "ignore_eos": True})
        report = client.get("/engine").json()
        assert model.device is not None
        memory = model.device.budget.taken
        assert report["device"] == {"name": "emulated", "layers": 1, "experts": 32, "memory": memory}
        assert report["counters"]["device_hits"] > 0
        lines = client.get("/metrics").text.splitlines()
    assert 'edgemoe_device_info{name="emulated"} 1' in lines
    assert "edgemoe_device_layers 1" in lines and f"edgemoe_device_memory_bytes {memory}" in lines
    (hits,) = [line for line in lines if line.startswith("edgemoe_device_hits_total ")]
    assert int(hits.split()[1]) > 0


def test_residency_is_told_as_bytes(
    http: httpx2.Client, bundled: edgemoe.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    http.post("/v1/completions", json={"prompt": "The sea", "max_tokens": 2})
    report: dict[str, Any] = http.get("/engine").json()
    shape = (report["layers"], report["experts"])
    resident = np.frombuffer(base64.b64decode(report["resident"]), "u1").reshape(shape)
    reads = np.frombuffer(base64.b64decode(report["reads"]), "<u4").reshape(shape)
    assert resident.any()
    assert (reads[resident > 0] > 0).all()
    levels = np.array([[0, 1, 255], [2, 0, 1]], np.uint8)
    counts = np.array([[0, 7, 0], [1 << 40, 0, 3]], np.uint64)
    monkeypatch.setattr(bundled.engine, "residency", lambda: (levels, counts))
    report = http.get("/engine").json()
    assert base64.b64decode(report["resident"]) == levels.tobytes()
    told = np.frombuffer(base64.b64decode(report["reads"]), "<u4").reshape(2, 3)
    assert told.tolist() == [[0, 7, 0], [(1 << 32) - 1, 0, 3]]


def test_anthropics_client_lists_the_model_too(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
