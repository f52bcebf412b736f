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
    environment = rank_environment(rank=1, ranks=4, port=20123)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_PORT"]) == ("1", "4", "20123")
