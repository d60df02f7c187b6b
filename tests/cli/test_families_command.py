"""edgemoe families: every family says what it is."""

from __future__ import annotations

import json

from click.testing import CliRunner

from edgemoe.cli import main
from edgemoe.families import family_names


def test_every_family_is_described() -> None:
    result = CliRunner().invoke(main, ["families", "--json"])
    assert result.exit_code == 0
    families = json.loads(result.stdout)
    assert [family["model_type"] for family in families] == family_names()
    for family in families:
        assert family["name"] and all(family["models"]) and family["features"], family["model_type"]
    architectures = [family["gguf_architecture"] for family in families if family["gguf_architecture"]]
    assert len(set(architectures)) == len(architectures)


def test_the_table_names_them() -> None:
    result = CliRunner().invoke(main, ["families"])
    assert result.exit_code == 0
    assert "qwen3_moe" in result.stdout and "Qwen3-30B-A3B" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 140
