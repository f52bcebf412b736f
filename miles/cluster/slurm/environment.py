"""What of the environment of `miles` reaches Slurm's commands, and what of it reaches a job.

A job gets all that `sbatch` itself gets (`--export=ALL`), and that is what is chosen here. With a list of names, or
with NONE, Slurm would run the user's login shell on the node for every start of the job, which is slow on some sites
and fails on others, and the batch script's `bash -l` reads the same profile anyhow.
"""

from __future__ import annotations

from collections.abc import Mapping

FOREIGN = ("SBATCH_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_", "SLURM_JOB", "SLURM_STEP", "SLURM_TASK")
"""Prefixes of variables that would change what a command does or prints: those of its options, and those of a job."""

PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "MODULEPATH"),
    *("VIRTUAL_ENV", "CONDA_PREFIX", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("WANDB_MODE", "WANDB_BASE_URL", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "MILES_NODE_ADDRESS"),
)
"""What a job gets of the environment of `miles submit`, besides the secrets and what finds the cluster."""

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Variables that reach the job from the environment of `miles submit`, by name: no file of a run holds their values."""

_CLUSTER = ("SLURM_CONF", "MUNGE_SOCKET")


def command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command: without what would change its options or its output; times in Unix seconds."""
    kept = {name: value for name, value in environment.items() if not name.startswith(FOREIGN)}
    return kept | {"SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of `sbatch`, and so of the job."""
    return {name: environment[name] for name in (*PASSED, *SECRETS, *_CLUSTER) if name in environment}
