"""The address by which the other nodes of a job reach this one, and the interface that bears it.

Found by asking the system which way it would send to a peer; nothing is sent.
"""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass

import psutil

from miles.cluster.allocation import ADDRESS_VARIABLE, Allocation
from miles.cluster.ports import LOOPBACK
from miles.errors import RunError

_ANY_PORT = 9


@dataclass(frozen=True, slots=True)
class Network:
    """Where servers of this node listen."""

    address: str
    interface: str


ONE_NODE = Network(LOOPBACK, "lo" if sys.platform == "linux" else "lo0")


def find_network(allocation: Allocation, head_address: str | None) -> Network:
    """This node's place in the network. `head_address`: None on the head itself.

    Raises RunError when no way leads to the other nodes, or the chosen address is none of this node's.
    """
    if len(allocation.nodes) == 1:
        return ONE_NODE
    peer = head_address or _resolve(allocation.nodes[1]) or allocation.launch_address
    if allocation.address is None and peer is None:
        raise RunError(
            f"node {allocation.name} of job {allocation.job} finds no address of node {allocation.nodes[1]}",
            fix=f"set {ADDRESS_VARIABLE} to the node's own address in slurm.setup",
        )
    address = allocation.address or _address_towards(str(peer))
    interface = _interface_of(address)
    if interface is None:
        raise RunError(
            f"{ADDRESS_VARIABLE} = '{address}' is no address of node {allocation.name}",
            fix="`ip -brief address` on that node shows those that it has",
        )
    return Network(address, interface)


def _resolve(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None  # names of Slurm's nodes need not be names of hosts


def _address_towards(peer: str) -> str:
    """This host's address on the route to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, _ANY_PORT))
        except OSError as error:
            raise RunError(
                f"no route leads from this node to {peer}: {error.strerror}",
                fix=f"set {ADDRESS_VARIABLE} to the node's own address in slurm.setup",
            ) from error
        return str(probe.getsockname()[0])


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return name
    return None
