"""Does a change leave every bit of every logit as it was?

    python -m bench.digests --models DIR [--package CHECKOUT] [--write FILE | --compare FILE]

Prints the SHA-256 of the logits' bytes for the bundled model (all qualities, all experts in memory and few, all types
of the state), for a tiny model of each configuration that the tests have of a family (float32 and quantized), for
packs with nested experts, and for GGUF files with each quantized type; and of a text that is generated token by token.

DIR: where the models lie. They are made there once, with random weights of fixed seeds, by the package of this checkout
(that needs torch, transformers and gguf); later runs, of whatever package, only read them. CHECKOUT: another checkout,
built in place, whose package is run instead: the digests of two states of the program come from the same files.

--write keeps the digests in FILE (JSON) and the logits beside it (in the .npz of that name); --compare prints what
differs from FILE, and by how much where the logits were kept, and ends with exit code 1 if anything does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import edgemoe  # noqa: E402
from bench._machine import say  # noqa: E402
from edgemoe.errors import MemoryBudgetError  # noqa: E402

LIST = "models.json"
EVERYTHING = 1 << 50
"""Bytes of memory that hold any model."""
FEW = 0.25
"""Of the experts, where few are in memory."""
QUALITIES = ("exact", "high", "balanced", "fast")
THRESHOLDS = {"high": [0.8], "balanced": [0.6], "fast": [0.4, 0.7]}
"""Of the modes of the nested packs that are made here."""
GENERATED = 24


@dataclass(frozen=True, slots=True)
class Run:
    """A model and how it is loaded. few: not all experts are in memory. options: of `edgemoe.load`."""

    name: str
    file: str
    tokens: int
    few: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


# -- the models -----------------------------------------------------------------------------------------------------


def make_models(folder: Path) -> None:
    """Writes the models and the list of what is to be run of them, the list last."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "families")]
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix in (".emoe", ".gguf"):  # of a run that was interrupted
            file.unlink()
    runs = [*_families(folder), *_nested(folder), *_gguf(folder)]
    (folder / LIST).write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def _families(folder: Path) -> Iterator[Run]:
    """Every configuration of the families' tests, with float32 weights and with quantized ones."""
    import tempfile

    import family_table
    import mixer_table

    from edgemoe.convert import convert

    for name, case in {**family_table.CASES, **mixer_table.CASES}.items():
        say(f"making {name}")
        with tempfile.TemporaryDirectory(prefix="digests-") as work:
            source = Path(work) / "hf"
            family_table.write_folder(source, case)
            for bits, dense_bits in ((32, 32), (4, 8)):
                file = f"{name.replace(', ', '_').replace(' ', '-')}-{bits}.emoe"
                convert(source, folder / file, bits, dense_bits=dense_bits)
                yield Run(f"{name}, {bits} bits", file, min(case.context, 160), options={"context": case.context})


def _nested(folder: Path) -> Iterator[Run]:
    """Experts of three levels, and of one to three."""
    import tempfile

    import nested
    from helpers import byte_level_tokenizer, write_tiny_qwen3_moe

    from edgemoe.convert import convert

    say("making nested packs")
    figures = {"perplexity": 9.0, "kl": 0.1}
    quality = {
        "text": "not measured",
        "tokens": 0,
        "reference": {"perplexity": 9.0},
        "levels": [{"bits": bits, **figures} for bits in (2, 3, 4)],
        "modes": {name: {"thresholds": chosen, "mean_bits": 3, **figures} for name, chosen in THRESHOLDS.items()},
    }
    with tempfile.TemporaryDirectory(prefix="digests-") as work:
        sizes = {"num_hidden_layers": 3, "num_experts": 12, "num_experts_per_tok": 3}
        write_tiny_qwen3_moe(Path(work) / "hf", tokenizer=byte_level_tokenizer(), **sizes)
        floats = Path(work) / "floats.emoe"
        convert(Path(work) / "hf", floats, 32)
        convert(Path(work) / "hf", folder / "qwen3_moe-4.emoe", 4)
        (folder / "qwen3_moe-32.emoe").write_bytes(floats.read_bytes())
        bits = (2, 3, 4)
        nested.write_nested_pack(floats, folder / "nested.emoe", bits, quality=quality)
        nested.write_nested_pack(floats, folder / "mixed.emoe", bits, lambda i, j: (i + j) % 3 + 1, quality=quality)
        nested.write_nested_pack(floats, folder / "other-widths.emoe", (3, 5, 8), quality=quality)
    for kept in (32, 4):
        yield Run(f"qwen3_moe, {kept} bits", f"qwen3_moe-{kept}.emoe", 128)
    for name in ("nested", "mixed", "other-widths"):
        for mode in QUALITIES:
            yield Run(f"{name} pack, {mode}", f"{name}.emoe", 128, options={"quality": mode})


def _gguf(folder: Path) -> Iterator[Run]:
    """A Qwen3-MoE for each type of block: in all matrices whose rows are whole blocks, except the routers'."""
    from tiny_gguf import BLOCKS, tiny_tensors, write

    say("making GGUF files")
    for kind in BLOCKS:
        write(folder / f"{kind}.gguf", *tiny_tensors(kind, hidden=256, ffn=256, experts=6))
        yield Run(f"GGUF, {kind}", f"{kind}.gguf", 96)


def bundled() -> Iterator[Run]:
    """The model in models/: the qualities with all experts and with few, and the types of the state."""
    file = str(next((ROOT / "models").glob("*.emoe")))
    for quality in QUALITIES:
        for few in (False, True):
            held = "few experts in memory" if few else "all experts in memory"
            yield Run(f"bundled, {quality}, {held}", file, 192, few, {"quality": quality})
    for kind in ("f32", "q8_0"):
        yield Run(f"bundled, state in {kind}", file, 192, False, {"cache_type_k": kind, "cache_type_v": kind})


# -- the digests ----------------------------------------------------------------------------------------------------


def load(folder: Path, run: Run, threads: int) -> edgemoe.Model:
    """Raises SystemExit where few experts in memory are asked for and no limit gives that."""
    options = {"context": 256, "threads": threads, **run.options}
    model = edgemoe.load(folder / run.file, gpu="none", memory=EVERYTHING, **options)
    if not run.few:
        return model
    budget = model.budget
    model.close()
    rest = budget.base + budget.dense + budget.state + budget.scratch
    cache = budget.slot_bytes * budget.expert_slots
    share = FEW
    while share < 1:  # what the process itself takes has changed since
        try:
            model = edgemoe.load(folder / run.file, gpu="none", memory=rest + int(share * cache), **options)
        except MemoryBudgetError:
            share += 0.05
            continue
        if model.budget.expert_slots < model.budget.all_slots:
            return model
        model.close()
        break
    raise SystemExit(f"digests: {run.name}: no limit leaves memory for some of the experts only")


def measure(folder: Path, runs: Sequence[Run], threads: int) -> Iterator[tuple[str, bytes, NDArray[np.float32] | None]]:
    """(name, bytes, logits [tokens, vocab]) of each run's logits; (name, bytes, None) of the texts."""
    for run in runs:
        with load(folder, run, threads) as model:
            tokens = np.random.default_rng(1).integers(0, model.spec.vocab_size, run.tokens).astype(np.int32)
            logits = model.logits(tokens)
            if not np.isfinite(logits).all():
                raise SystemExit(f"digests: {run.name}: logits that are not finite compare nothing")
            yield run.name, logits.tobytes(), logits
            prompt = tokens[:8].tolist()
            text = "".join(model.generate(prompt, max_tokens=GENERATED, temperature=0, ignore_eos=True))
            yield f"{run.name}; a text", text.encode(), None


def compare(
    before: Mapping[str, str],
    after: Mapping[str, str],
    old: Mapping[str, NDArray[np.float32]],
    new: Mapping[str, NDArray[np.float32]],
) -> list[str]:
    """A line for each digest that is new, gone or another one."""
    lines = [f"gone: {name}" for name in before if name not in after]
    lines += [f"new: {name}" for name in after if name not in before]
    for name in after:
        if name not in before or before[name] == after[name]:
            continue
        line = f"changed: {name}"
        if name in old and name in new:
            if old[name].shape == new[name].shape:
                difference = float(np.abs(old[name] - new[name]).max())
                spread = float(old[name].max() - old[name].min())
                line += f": largest difference {difference:.3g} ({difference / spread:.2g} of the logits' range)"
            else:
                line += f": {new[name].shape} where {old[name].shape} were"
        lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.digests", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="made there if there are none")
    parser.add_argument("--package", type=Path, metavar="CHECKOUT", help="run its package instead of this one")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose names contain it")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--write", type=Path, metavar="FILE")
    kept.add_argument("--compare", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    here = Path(edgemoe.__file__).resolve().parents[1]
    if not (options.models / LIST).exists():
        make_models(options.models)
    if options.package and here != options.package.resolve():
        if os.environ.get("DIGESTS_PACKAGE"):
            raise SystemExit(f"digests: {options.package} holds no package that is built: {here} would be run")
        environment = {**os.environ, "PYTHONPATH": str(options.package.resolve()), "DIGESTS_PACKAGE": "1"}
        # As a file, not as a module: the current folder must not come first.
        command = [sys.executable, str(Path(__file__).resolve()), *(sys.argv[1:] if argv is None else argv)]
        raise SystemExit(subprocess.run(command, env=environment).returncode)
    made = [Run(**run) for run in json.loads((options.models / LIST).read_text())]
    runs = [run for run in [*bundled(), *made] if options.only in run.name]
    print(f"package: {here}, instruction set {os.environ.get('EDGEMOE_ISA') or 'as detected'}", file=sys.stderr)
    digests: dict[str, str] = {}
    arrays: dict[str, NDArray[np.float32]] = {}
    keep = options.write or options.compare
    for name, data, logits in measure(options.models, runs, options.threads):
        digests[name] = hashlib.sha256(data).hexdigest()
        if keep and logits is not None:
            arrays[name] = logits
        if not options.compare:
            print(f"{digests[name][:16]}  {name}")
    if options.write:
        options.write.write_text(json.dumps(digests, indent=1) + "\n")
        np.savez(options.write.with_suffix(".npz"), **arrays)
    if options.compare:
        before = json.loads(options.compare.read_text())
        before = {name: digest for name, digest in before.items() if options.only in name}
        beside, old = options.compare.with_suffix(".npz"), {}
        if beside.exists():
            with np.load(beside) as file:
                old = {name: file[name] for name in file.files if options.only in name}
        lines = compare(before, digests, old, arrays)
        print("\n".join([*lines, f"{sum(before.get(name) == digests[name] for name in digests)} are the same"]))
        if lines:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
