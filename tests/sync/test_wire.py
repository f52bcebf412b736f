"""Buckets cross a process boundary bit for bit, and the reader refuses anything that is not a bucket."""

import base64
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from miles.sync.wire import Bucket, loads


def named() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("odd", torch.randn(3, 5, generator=generator).bfloat16()),
        ("scalar", torch.tensor(1.5)),
        ("matrix", torch.randn(7, 4, generator=generator)),
        ("transposed", torch.randn(4, 6, generator=generator).T),
    ]


def test_round_trip_in_another_process(tmp_path):
    bucket = Bucket(named())
    torch.save(dict(named()), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from miles.sync.wire import loads\n"
        "expected = torch.load(sys.argv[1])\n"
        "got = dict(loads(sys.stdin.read()))\n"
        "assert got.keys() == expected.keys()\n"
        "assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in expected.items())\n"
        "print('equal')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "expected.pt")],
        input=bucket.dumps(),
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "equal", result.stderr


def test_the_process_that_keeps_shared_memory_outlives_what_slurm_sends_to_all_processes():
    bucket = Bucket(named())
    bucket.dumps()
    bucket.dumps()
    managers = [child for child in psutil.Process().children() if child.name().startswith("torch_shm")]
    assert managers
    for manager in managers:
        blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{manager.pid}/status").read_text())
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            assert blocked and int(blocked[1], 16) & 1 << (number - 1)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_pickle_that_calls_something_is_refused():
    class Hostile:
        def __reduce__(self):
            return print, ("executed",)

    body = base64.b64encode(pickle.dumps({"flattened_tensor": Hostile(), "metadata": []})).decode()
    with pytest.raises(ValueError, match=r"must not contain builtins\.print"):
        loads(body)


@pytest.mark.parametrize("body", ["", "not base64!", base64.b64encode(b"junk").decode()])
def test_junk_is_refused(body):
    with pytest.raises(ValueError):
        loads(body)


def test_offsets_outside_the_buffer_are_refused():
    bucket = Bucket(named())
    bucket.metadata[0].end_idx += 4
    with pytest.raises(ValueError, match="are not a tensor of shape"):
        loads(bucket.dumps())
