"""Text of the recipe: gather it by domain, hold parts of it out, train the tokenizer, write token files.

Three domains: ``novel`` (an archive of plain-text novels), ``code`` (the standard library of the running Python) and
``docs`` (documentation packages of Debian, fetched without installing them). Everything is done in a fixed order, so
that the same inputs give the same token files.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

END_OF_TEXT = "<|endoftext|>"
DOMAINS = ("novel", "code", "docs")

# Never trained on. A held-out domain is a file of plain text, evaluated byte for byte.
HELD_OUT_NOVELS = ("Doyle_Lost_1912.txt", "Woolf_Lighthouse_1927.txt")
HELD_OUT_MODULES = (
    "argparse.py",
    "asyncio/queues.py",
    "csv.py",
    "email/message.py",
    "fractions.py",
    "heapq.py",
    "json/decoder.py",
    "sched.py",
    "statistics.py",
    "textwrap.py",
)
# One document of every package in this many is held out (by a hash of its path, so that it does not depend on order).
HELD_OUT_DOC_RATE = 50

# Tables of data and copies of documentation teach nothing about code.
SKIPPED_CODE = ("site-packages/", "test/", "tests/", "idlelib/", "encodings/", "pydoc_data/", "lib2to3/")

# Debian package: licence of its text, as its copyright file states it.
DOC_PACKAGES = {
    "anarchism": "GPL-2+ or GFDL-1.1+",
    "apache2-doc": "Apache-2.0",
    "debian-faq": "GPL-2+",
    "debian-handbook": "GPL-2+ or CC-BY-SA-3.0",
    "debian-history": "GPL-2+",
    "debian-policy": "GPL-2+",
    "debian-reference-en": "GPL-2+",
    "developers-reference": "GPL-2+",
    "dict-foldoc": "GFDL-1.1+",
    "dict-jargon": "public domain",
    "gimp-help-en": "GFDL-1.2+",
    "git-doc": "GPL-2",
    "gnucash-docs": "GFDL-1.1+",
    "libreoffice-help-en-us": "MPL-2.0 or LGPL-3+",
    "linux-doc-6.1": "GPL-2",
    "perl-doc": "GPL-1+ or Artistic",
    "postgresql-doc-15": "PostgreSQL",
    "python3.11-doc": "PSF-2.0",
    "sqlite3-doc": "public domain",
}
AUSTEN_PACKAGE = "r-cran-janeaustenr"  # the texts are in the public domain; held out as a whole
DOC_PACKAGE_BYTES = 5_000_000  # of clean text, so that no package outweighs the others

_QUOTES = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": " - ", "\u2013": "-", "\u00a0": " "}
)


def clean_prose(text: str) -> str:
    """Plain prose, one paragraph a line, one blank line between paragraphs, straight quotes."""
    text = unicodedata.normalize("NFC", text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n"))
    text = text.translate(_QUOTES)
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n[ \t]*\n", text))
    return "\n\n".join(p for p in paragraphs if p) + "\n"


def read_novels(archive: Path) -> dict[str, str]:
    """Clean text of every novel of a tar archive, by file name."""
    novels = {}
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is not None and member.name.endswith(".txt"):
                novels[Path(member.name).name] = clean_prose(stream.read().decode("utf-8", "replace"))
    return novels


def read_code(root: Path) -> dict[str, str]:
    """Source of the Python modules below ``root``, by relative path."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in SKIPPED_CODE):
            continue
        text = path.read_text("utf-8", "replace").replace("\r\n", "\n")
        if 200 <= len(text) <= 300_000:
            modules[name] = text
    return modules


_DROPPED = re.compile(r"<(script|style|head|nav|header|footer|table|pre|svg|form)\b.*?</\1\s*>|<!--.*?-->", re.S | re.I)
_BLOCK = re.compile(r"</?(p|div|h[1-6]|li|dd|dt|ul|ol|dl|br|hr|section|article|blockquote|td|tr)\b[^>]*>", re.I)
_TAG = re.compile(r"<[^>]+>")
_ENGLISH = re.compile(r"\b(?:the|of|and|to|is|in|that)\b")


def html_to_prose(page: str) -> list[str]:
    """Paragraphs of prose of an HTML page (navigation, tables and listings are dropped)."""
    text = _DROPPED.sub(" ", page)
    text = _TAG.sub("", _BLOCK.sub("\n\n", text.replace("\n", " ")))
    return clean_prose(html.unescape(text)).replace("\u00b6", "").strip().split("\n\n")


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return len(words) >= 8 and letters >= 0.85 * len(paragraph) and paragraph[-1] in ".:;!?)\"'"


def read_docs(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Prose of the unpacked documentation packages below ``root``: text by path, and version by package."""
    documents: dict[str, str] = {}
    versions: dict[str, str] = {}
    seen: set[str] = set()
    for package in DOC_PACKAGES:
        folder = root / package
        if not folder.is_dir():
            continue
        version = folder / "VERSION"
        versions[package] = version.read_text().strip() if version.is_file() else "unknown"
        size = 0
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file() or size >= DOC_PACKAGE_BYTES:
                continue
            if path.name.endswith((".html", ".xhtml")):
                paragraphs = html_to_prose(path.read_text("utf-8", "replace"))
            elif path.name.endswith(".dict.dz"):
                raw = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
                paragraphs = clean_prose(raw).strip().split("\n\n")
            else:
                continue
            # A paragraph seen before (menus, licences, other forms of the same page) is dropped everywhere.
            kept = []
            for paragraph in paragraphs:
                if _is_prose(paragraph) and paragraph not in seen:
                    seen.add(paragraph)
                    kept.append(paragraph)
            text = "\n\n".join(kept) + "\n"
            words = len(text.split())
            # The other languages of a package are told by their lack of the commonest English words.
            if words >= 60 and len(_ENGLISH.findall(text)) >= 0.1 * words:
                documents[path.relative_to(root).as_posix()] = text
                size += len(text)
    return documents, versions


def read_austen(root: Path) -> str:
    """Pride and Prejudice from the unpacked R package ``janeaustenr``, or "" when it is absent.

    An R lazy-load database is a sequence of chunks: a 4-byte big-endian size and a zlib stream of R's XDR
    serialization, in which a string is the flags 0x0004_0009 (or 0x0000_8009 for UTF-8), a length and its bytes.
    """
    database = root / AUSTEN_PACKAGE / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    if not database.is_file():
        return ""
    data = database.read_bytes()
    offset = 0
    while offset + 4 < len(data):
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(data[offset + 4 :])
        except zlib.error:
            return ""
        if b"PRIDE AND PREJUDICE" in raw[:4000]:
            lines = []
            for match in re.finditer(rb"\x00[\x04\x00][\x00\x80]\x09(\x00\x00..)", raw, re.S):
                length = int.from_bytes(match[1], "big")
                lines.append(raw[match.end() : match.end() + length].decode("utf-8", "replace"))
            return clean_prose("\n".join(lines))
        offset = len(data) - len(inflate.unused_data)
    return ""


def fetch_docs(out: Path) -> None:
    """Download the documentation packages with apt-get (nothing is installed) and unpack them below ``out``."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SystemExit("fetch-docs needs apt-get and dpkg-deb; train without documentation, or unpack it elsewhere")
    out.mkdir(parents=True, exist_ok=True)
    for package in (*DOC_PACKAGES, AUSTEN_PACKAGE):
        target = out / package
        if (target / "VERSION").is_file():
            continue
        download = subprocess.run(["apt-get", "download", package], cwd=out, capture_output=True, text=True)
        archives = sorted(out.glob(f"{package}_*.deb"))
        if download.returncode or not archives:
            print(f"{package}: not available, skipped", file=sys.stderr)
            continue
        subprocess.run(["dpkg-deb", "-x", str(archives[-1]), str(target)], check=True)
        (target / "VERSION").write_text(archives[-1].name.split("_")[1].replace("%3a", ":") + "\n")
        for archive in archives:
            archive.unlink()
        print(f"{package}: {(target / 'VERSION').read_text().strip()}")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Byte-level BPE with Qwen2's splitting of words and ``<|endoftext|>`` as entry 0."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words + rest), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _pick(key: str, rate: int) -> bool:
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % rate == 0


def prepare(text: Path, docs: Path | None, out: Path, vocab_size: int, sample_bytes: int, max_bytes: int = 0) -> None:
    """Write ``tokenizer.json``, ``DOMAIN.bin`` (uint16 tokens), ``heldout/NAME.txt`` and ``data.json`` into ``out``.

    ``sample_bytes`` of text per domain train the tokenizer; ``max_bytes`` bounds a domain (0: all of it).
    """
    archive = text / "novels.tar.xz"
    if not archive.is_file():
        raise SystemExit(f"{archive}: no such file (say where the novels are with --text)")
    train: dict[str, dict[str, str]] = {domain: {} for domain in DOMAINS}
    held: dict[str, dict[str, str]] = {}
    for name, body in read_novels(archive).items():
        (held.setdefault("novel", {}) if name in HELD_OUT_NOVELS else train["novel"])[name] = body
    for name, body in read_code(Path(sysconfig.get_paths()["stdlib"])).items():
        (held.setdefault("code", {}) if name in HELD_OUT_MODULES else train["code"])[name] = body
    versions: dict[str, str] = {}
    if docs is not None:
        documents, versions = read_docs(docs)
        for name, body in documents.items():
            (held.setdefault("docs", {}) if _pick(name, HELD_OUT_DOC_RATE) else train["docs"])[name] = body
        austen = read_austen(docs)
        if austen:
            held["novel-austen"] = {"Pride and Prejudice": austen}

    (out / "heldout").mkdir(parents=True, exist_ok=True)
    for domain, documents in held.items():
        (out / "heldout" / f"{domain}.txt").write_text("\n\n".join(documents.values()), encoding="utf-8")

    def sample(domain: str) -> Iterator[str]:
        names = sorted(train[domain], key=lambda n: hashlib.sha256(n.encode()).hexdigest())
        left = sample_bytes
        for name in names:
            if left <= 0:
                return
            # A slice of each document, so that the sample is of many authors.
            body = train[domain][name][: max(20_000, sample_bytes // 40)]
            left -= len(body)
            yield body

    tokenizer = train_tokenizer((body for domain in DOMAINS for body in sample(domain)), vocab_size)
    tokenizer.save(str(out / "tokenizer.json"))

    meta: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "domains": {}, "packages": versions}
    for domain in DOMAINS:
        names, size = [], 0
        for name in sorted(train[domain], key=lambda n: hashlib.sha256(n.encode()).hexdigest()):
            if not max_bytes or size < max_bytes:
                names.append(name)
                size += len(train[domain][name].encode())
        if not names:
            continue
        parts = []
        for first in range(0, len(names), 64):
            bodies = [train[domain][name] for name in names[first : first + 64]]
            for encoding in tokenizer.encode_batch(bodies):
                parts.append(np.array([0, *encoding.ids], dtype=np.uint16))
        tokens = np.concatenate(parts)
        tokens.tofile(out / f"{domain}.bin")
        meta["domains"][domain] = {"documents": len(names), "bytes": size, "tokens": int(tokens.size)}
    meta["held_out"] = {domain: sorted(documents) for domain, documents in held.items()}
    (out / "data.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(json.dumps({k: v for k, v in meta.items() if k != "held_out"}, indent=1))


def main(argv: list[str] | None = None) -> None:
    """Command line: ``fetch-docs`` and ``prepare``."""
    parser = argparse.ArgumentParser(prog="python -m tools.train.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch-docs", help="download and unpack the documentation packages")
    fetch.add_argument("--out", type=Path, required=True)
    prep = commands.add_parser("prepare", help="write the tokenizer, the token files and the held-out texts")
    prep.add_argument("--text", type=Path, default=Path("../shared/data/text"), help="folder with novels.tar.xz")
    prep.add_argument("--docs", type=Path, help="folder written by fetch-docs (left out: no docs domain)")
    prep.add_argument("--out", type=Path, required=True)
    prep.add_argument("--vocab-size", type=int, default=8192)
    prep.add_argument("--sample-bytes", type=int, default=12_000_000, help="bytes per domain the tokenizer learns from")
    prep.add_argument("--max-bytes", type=int, default=0, help="bytes per domain to keep, 0 for all")
    args = parser.parse_args(argv)
    if args.command == "fetch-docs":
        fetch_docs(args.out)
    else:
        prepare(args.text, args.docs, args.out, args.vocab_size, args.sample_bytes, args.max_bytes)


if __name__ == "__main__":
    main()
