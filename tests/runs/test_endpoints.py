from dataclasses import replace
from pathlib import Path

from miles.runs.endpoints import Endpoint, read_endpoints, write_endpoints

ENGINES = [Endpoint(index, f"http://127.0.0.1:2000{index}", start=1, ready=index == 0) for index in range(2)]


def test_no_file_is_no_engine(tmp_path: Path) -> None:
    assert read_endpoints(tmp_path / "engines.json") == []


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "engines.json"
    write_endpoints(file, ENGINES)
    assert read_endpoints(file) == ENGINES


def test_a_restart_replaces_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "engines.json"
    write_endpoints(file, ENGINES)
    again = [replace(ENGINES[0], url="http://127.0.0.1:20007", start=2, ready=False), ENGINES[1]]
    write_endpoints(file, again)
    assert read_endpoints(file) == again
    assert [path.name for path in tmp_path.iterdir()] == ["engines.json"]
