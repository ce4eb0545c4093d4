"""What several tests of the proof use."""

import json

import pytest

from parity import cli


@pytest.fixture
def prove(tmp_path):
    """prove(*arguments) runs the command here and returns its exit code and what it wrote as JSON."""
    def run(*arguments) -> tuple[int, dict]:
        file = tmp_path / "parity.json"
        return cli.main([*map(str, arguments), "--json", str(file)]), json.loads(file.read_text())
    return run
