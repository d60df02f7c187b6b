"""A server for tests of the page: the page itself, and answers that are known beforehand."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from edgemoe.server.page import page

LAYERS, EXPERTS = 48, 128

MARKDOWN = """# Whales

Some have *teeth*, others **baleen**; see [a page](https://example.org/whales) or `len(pod)`.

1. The blue whale
   - eats krill
   - weighs 150 t
2. The sperm whale

| Species | Length |
| --- | ---: |
| Blue | 30 m |
| Sperm | 18 m |

> They breathe air.

```python
def depth(whale):
    return whale.dives[-1].depth  # <b>metres</b>
```
"""

HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">
<svg onload="window.hacked = 3"><iframe src="javascript:window.hacked = 4"></iframe>

[click](javascript:window.hacked=5) [data](data:text/html,<script>window.hacked=6</script>) [vb](vbscript:x)
[tricked](  JaVaScRiPt:window.hacked=7) <javascript:window.hacked=8> [relative](/admin) [safe](https://example.org/"onclick=x)
![picture](https://example.org/pixel.png) ![bad](javascript:window.hacked=9) <style>body { display: none }</style>

```"><script>window.hacked=10</script>
</code></pre><script>window.hacked = 11</script>
```

| <b>a</b> | `</td><script>window.hacked=12</script>` |
| --- | --- |
| [x](javascript:window.hacked=13) | <form action="https://example.org"><button>Go</button></form> |
"""
# What makes a careless parser slow: each of these would take minutes in quadratic time.
SLOW = [
    "[" * 60_000 + "](u)",
    "**a " * 20_000,
    "`" * 3 + "a `` " * 20_000,
    "# " + " " * 60_000 + "x",
    "- | " + " " * 60_000 + "x\n- " + " " * 60_000 + "x",
    ">" * 30_000,
    "- " * 30_000,
    "_" * 60_000 + "a",
    "``` " + " " * 60_000 + "`",
    "` " + "x" * 60_000 + "`",
    "https://a" + ")" * 60_000,
]


class PageServer:
    """Serves on a free port of this machine. requests: bodies that it was sent. key: what it asks for, if anything.
    closed: answers whose reader has gone away. Words of an answer come `pause` seconds after each other."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.key: str | None = None
        self.closed = 0
        self.pause = 0.002
        self.running = 0
        self.tokens = 1000
        self.reads = np.zeros(LAYERS * EXPERTS, np.uint32)
        self.resident = (np.arange(LAYERS * EXPERTS) * 2654435761 % 100 < 25).astype(np.uint8)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": self}))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def engine(self) -> dict[str, Any]:
        if self.running:
            for at in np.random.default_rng(self.tokens).integers(0, LAYERS * EXPERTS, 120):
                self.reads[at] += 1
                self.resident[at] = 1
        return {
            "status": {"running": self.running, "waiting": 0, "sequences": 1, "positions_used": 512, "positions": 4096},
            "counters": {
                "tokens": self.tokens,
                "generated_tokens": self.tokens - 300,
                "experts_requested": self.tokens * 384,
                "experts_hit": self.tokens * 288,
                "bytes_read": self.tokens * 24_500_000,
            },
            "memory": {"limit": 4_000_000_000, "peak": 3_100_000_000, "cache": 2_200_000_000},
            "layers": LAYERS,
            "experts": EXPERTS,
            "resident": base64.b64encode(self.resident.tobytes()).decode(),
            "reads": base64.b64encode(self.reads.astype("<u4").tobytes()).decode(),
        }


def _pieces(asked: str) -> Iterator[dict[str, Any]]:
    """What is answered, as deltas of OpenAI's chunks."""

    def words(text: str, field: str = "content") -> Iterator[dict[str, Any]]:
        for word in text.split(" "):
            yield {field: word + " "}

    if asked.startswith("endless"):
        for number in range(10_000):
            yield {"content": f"{number} "}
    elif asked.startswith("think"):
        yield from words("The user wants to know. I weigh it.", "reasoning_content")
        yield from words("It is so.")
    elif asked.startswith("call"):
        yield {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "weather", "arguments": '{"city": '}}]}
        yield {"tool_calls": [{"index": 0, "function": {"arguments": '"<b>Oslo</b>"}'}}]}
    elif asked.startswith("hostile"):
        yield from words(HOSTILE)
    elif asked.startswith("slow"):
        yield {"content": SLOW[int(asked.split()[1])]}
    elif asked.startswith("markdown"):
        yield from words(MARKDOWN)
    else:
        yield from words(f"You said: {asked}")


class _Handler(BaseHTTPRequestHandler):
    stub: PageServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refused(self) -> bool:
        if self.stub.key is None or self.headers.get("Authorization") == f"Bearer {self.stub.key}":
            return False
        self._json({"error": {"message": "This server needs an API key.", "code": "invalid_api_key"}}, 401)
        return True

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, *page())
        elif self._refused():
            pass
        elif self.path == "/engine":
            self._json(self.stub.engine())
        elif self.path == "/v1/models":
            self._json(
                {"object": "list", "data": [{"id": "Qwen3-30B-A3B", "object": "model", "context_length": 32768}]}
            )
        else:
            self._json({"error": {"message": f"no {self.path}"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        self.stub.requests.append(body)
        asked = body["messages"][-1]["content"].split("\n\n")[-1]
        if asked.startswith("refuse"):
            self._json({"error": {"message": "temperature = 9 is above 5", "param": "temperature"}}, 400)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.stub.running += 1
        try:
            self._answer(asked)
        except OSError:
            self.stub.closed += 1
        finally:
            self.stub.running -= 1
            self.close_connection = True

    def _event(self, value: Any) -> None:
        self.wfile.write(f": still here\n\ndata: {value if value == '[DONE]' else json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, asked: str) -> None:
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]})
        count = 0
        for count, delta in enumerate(_pieces(asked), 1):
            self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            self.stub.tokens += 1
            time.sleep(self.stub.pause)
            if asked.startswith("fail") and count == 3:
                self._event({"error": {"message": "layer 3, expert 7: the read failed", "type": "server_error"}})
                return
            if asked.startswith("break") and count == 3:
                return
        finish = "tool_calls" if asked.startswith("call") else "length" if asked.startswith("long") else "stop"
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        self._event(
            {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": count, "total_tokens": 9 + count}}
        )
        self._event("[DONE]")
