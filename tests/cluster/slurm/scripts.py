"""Running rendered batch scripts on this machine: Slurm's programs are the stand-ins beside this file."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miles.cluster.slurm.render import render_job
from miles.cluster.slurm.spec import JobSpec
from miles.config.cluster import SlurmSection

STANDINS = Path(__file__).with_name("standins")
SPEC = JobSpec(
    run="demo",
    step="grpo",
    run_dir=Path("/shared/runs/demo"),
    section=SlurmSection(),
    command=("/env/bin/python", "-m", "miles.cluster.node", "--run-dir", "/shared/runs/demo", "--step", "grpo"),
    needs_ranks=True,
    environment={"PYTHONPATH": "/shared/miles"},
    output=Path("/shared/runs/demo/logs/slurm-grpo-%j.out"),
    nodes="1",
    dependency=None,
)


def spec(directory: Path | None = None, *, nodes: str = "1", **values: Any) -> JobSpec:
    """A job; `values` are those of `JobSpec` or keys of `[slurm]`."""
    own = {name: value for name, value in values.items() if name in JobSpec.__slots__}
    section = SlurmSection(**{name: value for name, value in values.items() if name not in own})
    if directory is not None:
        own |= {"run_dir": directory, "output": directory / "logs" / "slurm-grpo-%j.out"}
    return replace(SPEC, section=section, nodes=nodes, **own)


@dataclass
class Script:
    """A batch script with its record directory, running or ended."""

    record: Path
    process: subprocess.Popen[str]

    def end(self) -> tuple[int, str]:
        """Exit code and output, both streams."""
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output

    def wait_for(self, name: str) -> None:
        """Wait until a file of the record is there."""
        deadline = time.monotonic() + 20
        while not (self.record / name).exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.01)

    def lines(self, name: str) -> list[str]:
        """Lines of a file of the record; none where it is not there."""
        file = self.record / name
        return file.read_text().splitlines() if file.exists() else []

    def srun_arguments(self) -> list[str]:
        """What srun was given."""
        return (self.record / "srun").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]


def start(job: JobSpec, directory: Path, **environment: str) -> Script:
    """Run the script of a job as job 7, with files of the run in `job.run_dir` and the record in `directory`."""
    record = directory / "record"
    record.mkdir(exist_ok=True)
    defaults = {"state": "RUNNING", "restarts": "0", "time-left": "1-02:03:04"}
    for name, text in defaults.items():
        if not (record / name).exists():
            (record / name).write_text(text)
    script = directory / "job.sbatch"
    script.write_bytes(render_job(job).encode(errors="surrogateescape"))
    bash = shutil.which("bash")
    assert bash is not None
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_PARTITION": "low",
        "SLURM_EXPORT_ENV": "PATH",
        "TMPDIR": str(directory),
        "RECORD": str(record),
        "HOME": str(directory),
        "USER": "user",
        "PATH": f"{STANDINS}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        [bash, str(script)],
        cwd=directory,
        env=slurm | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return Script(record, process)


def run(job: JobSpec, directory: Path, **environment: str) -> tuple[int, str, Script]:
    """Run the script to its end: exit code, output, record."""
    script = start(job, directory, **environment)
    code, output = script.end()
    return code, output, script
