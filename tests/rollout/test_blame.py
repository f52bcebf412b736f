"""Who is to blame when requests fail."""

from miles.rollout import blame as module
from miles.rollout.blame import Blame
from miles.rollout.engines import Engine
from miles.runs.endpoints import Endpoint

ENGINE = Engine(Endpoint(0, "http://h:1", 1, True))


def test_a_request_that_fails_too_often_is_quarantined():
    blame = Blame(max_retries=1)
    blame.failed(3, ENGINE, "first")
    assert not blame.quarantined
    assert blame.avoid(3) == [ENGINE]
    blame.failed(3, ENGINE, "second")
    assert blame.quarantined == {3: "second (2 attempts)"}


def test_an_answer_clears_what_failed_before():
    blame = Blame(max_retries=1)
    blame.failed(3, ENGINE, "first")
    blame.answered(3)
    assert blame.avoid(3) == []
    assert blame.may_start(3)
    blame.failed(3, ENGINE, "again")
    assert not blame.quarantined


def test_a_failed_request_pauses_longer_each_time(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 100.0)
    blame = Blame(max_retries=9)
    assert blame.may_start(3)
    blame.failed(3, ENGINE, "first")
    assert not blame.may_start(3)
    assert blame.may_start(4)


def test_two_deaths_make_a_suspect_and_a_third_alone_convicts():
    blame = Blame(max_retries=0)
    blame.died(3, "gone", alone=True)
    blame.died(4, "gone", alone=False)
    assert not blame.is_suspect(3)
    blame.died(3, "gone", alone=False)
    assert blame.is_suspect(3)
    assert not blame.quarantined
    blame.died(3, "gone", alone=False)
    assert not blame.quarantined, "others were there"
    blame.died(3, "gone", alone=True)
    assert blame.quarantined == {3: "it kills engines, alone as well: gone"}


def test_a_refused_request_is_quarantined_at_once():
    blame = Blame(max_retries=5)
    blame.refused(1, "too long")
    assert blame.quarantined == {1: "too long"}
