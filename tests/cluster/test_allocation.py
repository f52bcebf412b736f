from collections.abc import Mapping

import pytest

from miles.cluster.allocation import DEFAULT_GRACE_SECONDS, Allocation
from miles.cluster.network import ONE_NODE, find_network
from miles.errors import RunError

JOB = {"SLURM_JOB_ID": "12", "SLURM_NODEID": "1", "SLURMD_NODENAME": "n2", "MILES_HOSTS": "n1,n2"}


def test_what_slurm_and_the_batch_script_say() -> None:
    allocation = Allocation.from_environment(JOB)
    assert (allocation.job, allocation.restart, allocation.index, allocation.name) == (12, 0, 1, "n2")
    assert (allocation.end, allocation.grace, allocation.live_jobs) == (None, DEFAULT_GRACE_SECONDS, None)
    more = {"SLURM_RESTART_COUNT": "2", "MILES_JOB_END": "1700000000", "MILES_GRACE": "0", "MILES_LIVE_JOBS": "12,13"}
    allocation = Allocation.from_environment(JOB | more)
    assert (allocation.restart, allocation.end, allocation.grace) == (2, 1.7e9, 0.0)
    assert allocation.live_jobs == {12, 13}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "not a task of a Slurm job: SLURM_JOB_ID is not set"),
        ({"SLURM_JOB_ID": "12"}, "SLURM_NODEID is not set"),
        (JOB | {"SLURM_NODEID": "2"}, "node 2 of job 12, which has 2 nodes by MILES_HOSTS = 'n1,n2'"),
        (JOB | {"SLURM_NODEID": "0"}, "node 0 of job 12 is n1 by MILES_HOSTS, and n2 by SLURMD_NODENAME"),
        (JOB | {"SLURM_JOB_ID": "twelve"}, "SLURM_JOB_ID = 'twelve' is not a number"),
        (JOB | {"MILES_JOB_END": "soon"}, "MILES_JOB_END = 'soon' is not a number of seconds"),
    ],
)
def test_what_cannot_be_is_refused(environment: Mapping[str, str], message: str) -> None:
    with pytest.raises(RunError) as error:
        Allocation.from_environment(environment)
    assert message in error.value.message
    assert error.value.fix


def test_one_node_needs_no_names_and_stays_on_the_loopback() -> None:
    allocation = Allocation.from_environment({"SLURM_JOB_ID": "12", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n7"})
    assert allocation.nodes == ("n7",)
    assert find_network(allocation, None) == ONE_NODE


def test_near_jobs_runs_and_nodes_search_for_ports_elsewhere() -> None:
    allocations = [
        Allocation(job, restart, index, ("a", "b", "c")) for job in (12, 13) for restart in (0, 1) for index in range(3)
    ]
    starts = {allocation.port_seed * 997 % 12000 for allocation in allocations}
    assert len(starts) == len(allocations)


def test_address_is_that_of_the_route_to_the_head() -> None:
    network = find_network(Allocation(12, 0, 1, ("n1", "n2")), "127.0.0.1")
    assert network == ONE_NODE


def test_nodes_without_an_address_ask_for_one() -> None:
    with pytest.raises(RunError, match=r"finds no address of node no-such-host\.invalid") as error:
        find_network(Allocation(12, 0, 0, ("n1", "no-such-host.invalid")), None)
    assert "MILES_NODE_ADDRESS" in str(error.value.fix)
    with pytest.raises(RunError, match="is no address of node n1"):
        find_network(Allocation(12, 0, 0, ("n1", "n2"), address="192.0.2.1"), None)
