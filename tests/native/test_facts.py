"""What the engine is told: every field by name and type, on both sides of the binding."""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import write_tiny_qwen3_moe

from edgemoe import _core
from edgemoe.convert import convert
from edgemoe.formats.index import ModelIndex
from edgemoe.formats.pack import Pack
from edgemoe.options import EngineOptions, Quality
from edgemoe.spec import RopeSpec

OPTIONS = EngineOptions(threads=1, context=64)

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ModelIndex:
    folder = tmp_path_factory.mktemp("facts")
    write_tiny_qwen3_moe(folder / "tiny")
    convert(folder / "tiny", folder / "tiny.emoe", 8)
    return Pack.open(folder / "tiny.emoe").index


def changed(value: Any, path: str, change: Change) -> Any:
    """A copy of a dataclass, tuple or dict, with what lies at a path of it ("spec.layers[0].router") changed; no
    dataclass checks itself anew."""
    step = re.match(r"\.?(\w+)|\[([^]]+)\]", path)
    if step is None:
        return change(value)
    name, key, rest = step[1], step[2], path[step.end() :]
    if isinstance(value, tuple):
        return tuple(changed(item, rest, change) if i == int(key) else item for i, item in enumerate(value))
    if isinstance(value, dict):
        found = int(key) if key.isdigit() else key
        return {**value, found: changed(value[found], rest, change)}
    result = copy.copy(value)
    object.__setattr__(result, name, changed(getattr(value, name), rest, change))
    return result


def fields_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def made(value: Any, fields: dict[str, Any]) -> Any:
    """A dataclass of the name of value's, with these fields."""
    return dataclasses.make_dataclass(type(value).__name__, list(fields), frozen=True, slots=True)(**fields)


def with_one_more(value: Any) -> Any:
    return made(value, {**fields_of(value), "threds": 4})


def without(name: str) -> Change:
    return lambda value: made(value, {key: found for key, found in fields_of(value).items() if key != name})


FIELDS = [
    "quality",
    "spec.norm_offset",
    "spec.layers[1].ffn_dim",
    "spec.layers[1].attention.sinks",
    "spec.layers[0].attention.rope.interleaved",
    "spec.layers[1].router.groups",
    "sections[2].checksum",
    "sections[2].extents[0].length",
    "dense[layers.1.q].shape",
    "experts[1].levels",
    "experts[1].levels[0].bits",
    "experts[1].levels[0].parts[down].offset",
]
"""A field of every class of the index."""


def holder(field: str) -> str:
    """Where the dataclass lies that has a field."""
    return field.rpartition(".")[0]


def test_what_is_right_is_read(index: ModelIndex) -> None:
    plan = _core.plan(index, OPTIONS)
    assert plan.dense > 0 and plan.state > 0 and plan.slot > 0
    assert plan.experts == sum(layer.experts for layer in index.spec.layers)


@pytest.mark.parametrize("place", [holder(field) for field in FIELDS])
def test_a_field_that_the_engine_does_not_know_is_refused(index: ModelIndex, place: str) -> None:
    wrong = changed(index, place, with_one_more)
    with pytest.raises(TypeError) as error:
        _core.plan(wrong, OPTIONS)
    where = ".".join(filter(None, ("ModelIndex", place, "threds")))
    assert str(error.value) == f"{where} is not a field that the engine knows"
    with pytest.raises(TypeError):
        _core.Engine(wrong, OPTIONS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_refused(index: ModelIndex, field: str) -> None:
    with pytest.raises(TypeError) as error:
        _core.plan(changed(index, holder(field), without(field.rpartition(".")[2])), OPTIONS)
    assert str(error.value) == f"ModelIndex.{field} is missing"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineOptions)])
def test_every_option_must_be_there(index: ModelIndex, field: str) -> None:
    with pytest.raises(TypeError, match=rf"^EngineOptions\.{field} is missing$"):
        _core.plan(index, without(field)(OPTIONS))


def thresholds(value: Any) -> Quality:
    return Quality(thresholds=value)


def level_cap(value: Any) -> Quality:
    return Quality(level_cap=value)


def test_an_option_that_the_engine_does_not_know_is_refused(index: ModelIndex) -> None:
    with pytest.raises(TypeError, match=r"^EngineOptions\.threds is not a field that the engine knows$"):
        _core.plan(index, with_one_more(OPTIONS))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("threads", "2", "EngineOptions.threads: an int is expected, not str"),
        ("threads", 2.0, "EngineOptions.threads: an int is expected, not float"),
        ("threads", True, "EngineOptions.threads: an int is expected, not bool"),
        ("threads", None, "EngineOptions.threads: an int is expected, not NoneType"),
        ("prefetch", 1, "EngineOptions.prefetch: a bool is expected, not int"),
        ("quality", {}, "EngineOptions.quality: a dataclass is expected, not dict"),
        ("quality", thresholds(0.5), "EngineOptions.quality.thresholds: a tuple is expected, not float"),
        ("quality", thresholds(("a",)), "EngineOptions.quality.thresholds: a float is expected, not str"),
        ("quality", thresholds((True,)), "EngineOptions.quality.thresholds: a float is expected, not bool"),
        ("cache_type_k", b"f16", "EngineOptions.cache_type_k: a str is expected, not bytes"),
        ("quality", level_cap("1"), "EngineOptions.quality.level_cap: an int is expected, not str"),
    ],
)
def test_a_field_of_another_type_is_refused(index: ModelIndex, field: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError) as error:
        _core.plan(index, dataclasses.replace(OPTIONS, **{field: value}))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("threads", 0, "threads, sequences, context, chunk and readers are at least 1"),
        ("positions", 63, "positions is less than context"),
        ("threads", 1 << 31, "EngineOptions.threads = 2147483648 is not between -2147483648 and 2147483647"),
        ("threads", 1 << 99, "is not between"),
        ("quality", level_cap(-1), "level_cap is negative"),
        ("cache_type_v", "q4_0", "EngineOptions.cache_type_v = 'q4_0' is not known"),
        ("eviction", "fifo", "fifo"),
        ("isa", "mmx", "mmx"),
    ],
)
def test_a_value_that_cannot_be_is_refused(index: ModelIndex, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        _core.Engine(index, dataclasses.replace(OPTIONS, **{field: value}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec", {}, "ModelIndex.spec: a dataclass is expected, not dict"),
        ("spec.layers", {}, "ModelIndex.spec.layers: a tuple is expected, not dict"),
        ("dense", (), "ModelIndex.dense: a dict is expected, not tuple"),
        ("experts", {"1": None}, "ModelIndex.experts: an int is expected, not str"),
        ("sections[1]", None, "ModelIndex.sections[1]: a dataclass is expected, not NoneType"),
        ("files", "a", "ModelIndex.files: a tuple is expected, not str"),
    ],
)
def test_what_is_no_dataclass_is_refused(index: ModelIndex, path: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError) as error:
        _core.plan(changed(index, path, lambda _: value), OPTIONS)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sections[0].extents", (), "a section without extents"),
        ("sections[0].extents[0].file", 1, "an extent names an unknown file"),
        ("sections[0].extents[0].offset", -1, "offset = -1 is not between 0 and"),
        ("experts[1].sections[2]", (9999,), "an expert names an unknown section"),
        ("experts[1].sections[2]", (), "an expert has other levels than its layer"),
        ("experts[1].levels[0].parts", {}, "an expert has three parts"),
        ("experts[1].levels[0].parts[down].layout", "q9", "q9"),
        ("experts[1].levels[0].parts[down].shape", (), "neither a matrix nor a vector"),
        ("spec.layers[1].router.scores", "softmin", "ModelIndex.spec.layers[1].router.scores = 'softmin' is not known"),
    ],
)
def test_what_leads_nowhere_is_refused(index: ModelIndex, path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        _core.plan(changed(index, path, lambda _: value), OPTIONS)
    assert message in str(error.value)


def test_a_part_of_another_name_is_refused(index: ModelIndex) -> None:
    parts = index.experts[1].levels[0].parts
    wrong = changed(index, "experts[1].levels[0].parts", lambda _: {**parts, "gte": parts["gate"]})
    with pytest.raises(ValueError, match="an expert has no part 'gte'"):
        _core.plan(wrong, OPTIONS)


def test_frequencies_must_have_been_chosen(index: ModelIndex) -> None:
    """A model with two sets of rotary frequencies is loaded for a context, which decides between them."""
    rope = index.spec.layers[0].attention.rope
    assert rope is not None
    long = RopeSpec(rope.inverse_frequencies, False, 1.0, rope.inverse_frequencies, 2.0, 100)
    both = changed(index, "spec.layers[0].attention.rope", lambda _: long)
    with pytest.raises(ValueError, match="for_context"):
        _core.plan(both, OPTIONS)
    for context, factor in ((100, 1.0), (101, 2.0)):
        spec = both.spec.for_context(context)
        assert spec.layers[0].attention.rope == RopeSpec(rope.inverse_frequencies, False, factor)
        _core.plan(dataclasses.replace(both, spec=spec), OPTIONS)


def test_python_refuses_a_misspelt_field(index: ModelIndex) -> None:
    with pytest.raises(TypeError, match="threds"):
        EngineOptions(threads=1, context=64, threds=2)  # type: ignore[call-arg]
    with pytest.raises((AttributeError, TypeError)):  # frozen and slotted
        OPTIONS.threds = 2  # type: ignore[attr-defined]
    plan = _core.plan(index, OPTIONS)
    with pytest.raises(AttributeError):
        plan.densee  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError):
        plan.dense = 3  # type: ignore[misc]


def test_counters_are_read_only_and_subtract(index: ModelIndex) -> None:
    engine = _core.Engine(index, dataclasses.replace(OPTIONS, expert_slots=4))
    before = engine.counters()
    engine.forward([1, 2, 3], [0, 1, 2], [0, 0, 0], [2])  # type: ignore[arg-type]
    middle = engine.counters()
    engine.forward([4], [3], [0], [0])  # type: ignore[arg-type]
    assert (middle - before).tokens == middle.tokens == 3
    last = engine.counters() - middle
    assert last.tokens == 1 and last.expert_uses == len(index.experts) * index.spec.layers[1].top_k
    assert last.expert_bits == 8 * last.expert_uses
    assert 0 < last.experts_requested == last.expert_uses and 0 <= last.experts_hit <= last.experts_requested
    assert last.bytes_read >= 0 and last.seconds > 0 and last.stall_seconds >= 0
    with pytest.raises(AttributeError):
        last.tokens = 3  # type: ignore[misc]


def test_the_stub_names_what_is_there() -> None:
    """Every class of the engine's part of _core.pyi, with its attributes."""
    stub = ast.parse((Path(_core.__file__).with_name("_core.pyi")).read_text())
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            described = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            found = set(vars(getattr(_core, node.name)))
            assert described <= found, node.name
            assert {name for name in found if not name.startswith("_")} <= described, node.name
