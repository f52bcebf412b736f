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


def test_engines_of_several_nodes_are_one_list_and_wait_for_each_other(tmp_path: Path) -> None:
    file = tmp_path / "engines.json"
    write_endpoints(file, [Endpoint(0, "http://10.0.0.1:20000", 1, ready=True)], node=0, nodes=3)
    write_endpoints(file, [Endpoint(2, "http://10.0.0.3:20000", 1, ready=True)], node=2, nodes=3)
    engines = read_endpoints(file)
    assert [(engine.index, engine.ready) for engine in engines] == [(0, True), (1, False), (2, True)]
    assert {path.name for path in tmp_path.iterdir()} == {"engines.json", "engines-2.json"}
