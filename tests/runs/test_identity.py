import os
import subprocess
import sys
from dataclasses import replace

from miles.runs.identity import ProcessIdentity


def test_process_is_recognized_by_pid_and_start_time() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = ProcessIdentity.of(process.pid)
    assert identity.alive()
    assert ProcessIdentity.parse(identity.record()) == identity
    assert not replace(identity, started=identity.started - 100.0).alive()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not identity.alive(), "a zombie does not count as running"
    process.wait()
    assert not identity.alive()


def test_process_of_another_host_counts_as_running() -> None:
    identity = replace(ProcessIdentity.of(), host="elsewhere", pid=2**22 - 1)
    assert not identity.local
    assert identity.alive()
