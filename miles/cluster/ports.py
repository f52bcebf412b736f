"""Free TCP ports on this host. Other people share the node: every port is tried before it is handed out."""

from __future__ import annotations

import errno
import socket

from miles.errors import RunError

# Below the range from which systems take the ports of outgoing connections (Linux: from 32768).
_FIRST, _COUNT = 20000, 12000

LOOPBACK = "127.0.0.1"


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
        return True


def choose_ports(count: int, *, seed: int, host: str = LOOPBACK) -> list[int]:
    """`count` different free ports. Different seeds start their search at different places.

    Raises RunError when this host has no more free ports in the range that Miles uses.
    """
    ports: list[int] = []
    start = seed * 997 % _COUNT  # a prime step keeps neighbouring seeds apart
    for offset in range(_COUNT):
        if len(ports) == count:
            break
        port = _FIRST + (start + offset) % _COUNT
        if is_free(port, host):
            ports.append(port)
    if len(ports) < count:
        raise RunError(
            f"found {len(ports)} of {count} free ports between {_FIRST} and {_FIRST + _COUNT - 1} on {host}",
            fix="end other servers on this host",
        )
    return ports
