"""Writing a job down: `JobSpec` in, the text of its batch script out."""

from __future__ import annotations

from miles.cluster.slurm.spec import JobSpec


def render_job(spec: JobSpec, template: str | None = None) -> str:
    """The batch script of a job, from the template's text, or the one that the run file names, or Miles' own."""
    raise NotImplementedError
