import socket

import pytest

from miles.cluster import ports
from miles.cluster.ports import LOOPBACK, choose_ports, is_free
from miles.errors import RunError


def test_chosen_ports_are_different_and_can_be_listened_on() -> None:
    chosen = choose_ports(5, seed=1)
    assert len(set(chosen)) == 5
    servers = [socket.create_server((LOOPBACK, port)) for port in chosen]
    assert not any(is_free(port) for port in chosen)
    for server in servers:
        server.close()


def test_port_in_use_is_passed_over() -> None:
    (first,) = choose_ports(1, seed=2)
    with socket.create_server((LOOPBACK, first)):
        assert first not in choose_ports(3, seed=2)


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_COUNT", 1)
    with (
        socket.create_server((LOOPBACK, 20000)),
        pytest.raises(RunError, match="found 0 of 1 free ports between 20000 and 20000"),
    ):
        choose_ports(1, seed=0)
