"""The page at `/`: a conversation, and beside it what the engine does. One file, hand-written, that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page, and the headers it is to be served with.

    What models write is shown on this page. Its policy therefore allows the one script and the one style that the file
    holds, by their hashes, requests to the server it came from, and nothing else: no other script or style, no picture
    from elsewhere, no frame, no form that leads anywhere, no text that a script turns into HTML.
    """
    body = (resources.files(__package__) / "index.html").read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _hash(body, b"script"),
        "style-src": _hash(body, b"style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon in the file
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return body, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hash(body: bytes, tag: bytes) -> str:
    """The only element of this name, as a source of the policy: the hash of its text."""
    (text,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
