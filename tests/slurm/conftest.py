"""Fixtures of the tests on a real Slurm cluster; testbed.py says how to use them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm.testbed import FOREIGN, Testbed, installed


@pytest.fixture(scope="session")
def slurm_clusters() -> Iterator[Callable[..., Testbed]]:
    """Gives the cluster with these settings (those of `Testbed`), started once per session and idle."""
    if not installed():
        missing = "Slurm is not installed: apt-get install slurmctld slurmd slurm-client munge"
        if os.environ.get("CI") == "1":
            pytest.fail(missing)
        warnings.warn(f"the tests on a real Slurm do not run. {missing}", stacklevel=1)
        pytest.skip(missing)
    clusters: dict[str, Testbed] = {}

    def cluster(**settings: Any) -> Testbed:
        key = json.dumps(settings, sort_keys=True)
        if key not in clusters:
            # Names of sockets are short: not below pytest's own directories.
            clusters[key] = Testbed(Path(tempfile.mkdtemp(prefix="slurm-")), **settings)
        clusters[key].reset()
        return clusters[key]

    yield cluster
    for bed in clusters.values():
        bed.down()
        shutil.rmtree(bed.directory)


@pytest.fixture
def slurm(slurm_clusters: Callable[..., Testbed], monkeypatch: pytest.MonkeyPatch) -> Iterator[Testbed]:
    """An idle cluster with default settings, and the environment of a user of it."""
    bed = slurm_clusters()
    become_user(bed, monkeypatch)
    yield bed
    bed.reset()


def become_user(bed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the environment of the test that of a user of the cluster."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    for name in ("PATH", "SLURM_CONF", "MUNGE_SOCKET"):
        monkeypatch.setenv(name, bed.environment[name])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a cluster carries the marker `slurm`."""
    for item in items:
        if {"slurm", "slurm_clusters"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slurm)
