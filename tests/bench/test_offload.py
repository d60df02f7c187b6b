"""What the offload benchmark is made of."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("psutil")
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench._cage import Cage, run
from bench._disk import random_read_bandwidth
from bench.offload import decode_groups, parse
from edgemoe.profiling import TraceWriter


def test_groups_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.msgpack"
    with TraceWriter(path, "model", [4, 0, 8], [2, 0, 1]) as writer:
        for position, ids in enumerate([[0, 1, 7], [3, 1, 6], [2, 0, 7], [1, 3, 0], [0, 1, 2]]):
            writer.write("text", position, ids)
    groups, first = decode_groups(path, [4, 0, 8], prompt=2, tokens=4)
    assert first == 2
    assert groups == [[0, 1, 3], [10, 11], [2, 0], [11], [1, 3], [4]]


@pytest.fixture
def cages() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("control groups are Linux's")
    try:
        with Cage.create(None):
            pass
    except OSError as error:
        pytest.skip(f"no right to make a control group: {error}")


CHILD = "import sys, json; data = bytearray(int(sys.argv[1])); data[::4096] = bytes(len(data[::4096])) ; "
CHILD += "print(json.dumps(len(data)))"


@pytest.mark.usefixtures("cages")
def test_a_cage_counts_and_holds() -> None:
    for limit in (None, 256 << 20):
        command = [sys.executable, "-c", CHILD, str(64 << 20)]
        outcome = run(command, limit, caged=True, environment=os.environ)
        assert outcome.report == 64 << 20, outcome.error
        assert outcome.charge is not None
        assert outcome.charge.failures == 0
        assert outcome.charge.peak is None or 64 << 20 < outcome.charge.peak < 256 << 20
    outcome = run([sys.executable, "-c", CHILD, str(512 << 20)], 128 << 20, caged=True, environment=os.environ)
    assert outcome.report is None
    assert "killed" in outcome.error
    assert outcome.charge is not None
    assert outcome.charge.failures


def test_a_child_that_fails_is_reported() -> None:
    failing = [sys.executable, "-c", "raise SystemExit('no such model')"]
    outcome = run(failing, None, caged=False, environment=os.environ)
    assert (outcome.report, outcome.error) == (None, "exit code 1 no such model")
    outcome = run([sys.executable, "-c", "print('hello')"], None, caged=False, environment=os.environ)
    assert outcome.error.startswith("no report: 'hello")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads past the page cache")
def test_random_reads(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert random_read_bandwidth(path, 65536, [0, 65536, 1 << 30], seconds=0.05) > 0


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (([], "name a model"), (["--synthetic", "2", "--limits", "0,50"], "percentages")):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert message in capsys.readouterr().err
    assert parse(["--existing", "a.emoe,a.gguf", "--limits", "25,100"]).limits == [25.0, 100.0]
