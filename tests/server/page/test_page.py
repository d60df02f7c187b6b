"""The page as a file: what it is served with, and what its text must not have."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from edgemoe.server.page import page


def policy() -> dict[str, str]:
    _, headers = page()
    return dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))


def test_the_policy_names_the_hashes_of_the_script_and_the_style() -> None:
    body, _ = page()
    for tag in ("script", "style"):
        text = body.split(f"<{tag}>".encode())[1].split(f"</{tag}>".encode())[0]
        assert policy()[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


def test_the_policy_allows_nothing_else() -> None:
    allowed = policy()
    assert allowed.pop("connect-src") == "'self'"
    assert allowed.pop("img-src") == "data:"
    assert allowed.pop("require-trusted-types-for") == "'script'"
    assert allowed.pop("script-src").count("'") == allowed.pop("style-src").count("'") == 2
    assert set(allowed) == {"default-src", "frame-ancestors", "base-uri", "form-action", "trusted-types"}
    assert set(allowed.values()) == {"'none'"}


def test_headers_forbid_guesses_and_referrers() -> None:
    _, headers = page()
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    "forbidden",
    [
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "createContextualFragment"),
        *("eval(", "new Function", "srcdoc", 'make("img"', 'make("script"', " style=", " onclick="),
    ],
)
def test_nothing_turns_text_into_html_or_code(forbidden: str) -> None:
    body, _ = page()
    assert forbidden not in body.decode()


def test_nothing_is_loaded_from_elsewhere() -> None:
    body, _ = page()
    assert not re.search(r"""(?:src|href)="(?!#|data:image/svg)|url\(|@import|\bimport\s*\(""", body.decode())
