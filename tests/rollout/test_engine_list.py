"""Which engines may be asked, as the supervisor's file and the pushes say."""

import pytest

from miles.rollout import engines as module
from miles.rollout.engines import EngineList
from miles.runs.endpoints import Endpoint, write_endpoints


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "engines.json"
    write(path, 1, 1)
    return path


def write(path, *starts: int, ready: bool = True) -> None:
    write_endpoints(path, [Endpoint(i, f"http://h:{i}{start}", start, ready) for i, start in enumerate(starts)])


def test_engines_serve_only_with_the_newest_weights(file):
    engines = EngineList(file, receive_weights=True)
    assert engines.in_service == []
    assert engines.least_loaded() is None
    assert engines.receivers(0) == [0, 1]
    engines.pushed(0, [0])
    assert [engine.endpoint.index for engine in engines.in_service] == [0]
    assert engines.needs_weights()
    assert engines.receivers(0) == [1]
    engines.pushed(0, [1])
    assert len(engines.in_service) == 2
    assert not engines.needs_weights()
    assert engines.receivers(1) == [0, 1]
    assert engines.in_service == [], "the weights of before are not current any more"
    engines.pushed(1, [1])
    assert [engine.endpoint.index for engine in engines.in_service] == [1]


def test_engines_that_get_no_weights_serve_when_they_are_ready(file):
    engines = EngineList(file, receive_weights=False)
    assert len(engines.in_service) == 2
    assert not engines.needs_weights()
    write(file, 1, ready=False)
    engines.refresh()
    assert engines.in_service == []
    assert not engines.all_ready


def test_a_new_start_holds_nothing_and_is_not_the_receiver_of_a_push_to_the_old_one(file):
    engines = EngineList(file, receive_weights=True)
    assert engines.receivers(0) == [0, 1]
    write(file, 1, 2)
    engines.refresh()
    assert engines.receiver(0) is not None
    assert engines.receiver(1) is None
    engines.pushed(0, [0, 1])
    assert [engine.endpoint.index for engine in engines.in_service] == [0]
    assert engines.receivers(0) == [1]
    assert engines.receiver(1) is not None


def test_the_least_loaded_engine_is_asked_rather_none_that_failed(file):
    engines = EngineList(file, receive_weights=False)
    first, second = engines.in_service
    first.load = 3
    assert engines.least_loaded() is second
    assert engines.least_loaded([second]) is first
    assert engines.least_loaded([first, second]) is second


def test_an_unreachable_engine_is_left_alone_for_a_while_that_grows(file, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 1.0)
    engines = EngineList(file, receive_weights=False)
    first, second = engines.in_service
    assert first.unreachable()
    assert not first.unreachable(), "known already"
    assert first.pause == 1.0
    assert engines.least_loaded() is second
    second.unreachable()
    assert engines.least_loaded() is None
    first.paused_until = 0.0
    assert engines.least_loaded() is first
    assert first.unreachable()
    assert first.pause == 2.0
    first.answered()
    assert engines.least_loaded() is first


def test_there_are_no_engines_before_there_is_a_file(tmp_path):
    engines = EngineList(tmp_path / "engines.json", receive_weights=True)
    assert not engines.all_ready
    write(tmp_path / "engines.json", 1)
    engines.refresh()
    assert engines.all_ready


def test_an_engine_that_does_not_answer_is_given_no_weights_for_a_while(file, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 1.0)
    engines = EngineList(file, receive_weights=True)
    assert engines.receivers(0) == [0, 1]
    engines.receiver(1).unreachable()
    engines.pushed(0, [0])
    assert not engines.needs_weights()
    assert not engines.all_ready
    assert engines.receivers(0) == []
    engines.ready[1].paused_until = 0.0
    assert engines.needs_weights()
    assert engines.receivers(0) == [1]
