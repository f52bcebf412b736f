import pytest

from miles.cluster.cpu import cpu_environment, rank_environment


@pytest.mark.parametrize(
    ("threads", "processes", "cores", "expected"),
    [(None, 1, 8, "8"), (None, 2, 8, "4"), (None, 4, 2, "1"), (3, 2, 8, "3")],
)
def test_cores_are_divided_among_equal_processes(
    threads: int | None, processes: int, cores: int, expected: str
) -> None:
    environment = cpu_environment(threads=threads, processes=processes, cores=cores)
    assert environment["OMP_NUM_THREADS"] == expected
    assert environment["GOMP_SPINCOUNT"] == "0"


def test_rank_knows_its_place() -> None:
    environment = rank_environment(3, local_ranks=range(2, 4), world=4, address="10.0.0.1", port=20123, interface="ib0")
    assert environment["RANK"] == "3"
    assert environment["LOCAL_RANK"] == "1"
    assert environment["WORLD_SIZE"] == "4"
    assert environment["LOCAL_WORLD_SIZE"] == "2"
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "20123")
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
