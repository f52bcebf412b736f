"""What the command imports before it answers. Imports are what its time is made of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HEAVY = {
    "aiohttp", "h5py", "jinja2", "matplotlib", "megatron", "numpy", "pandas", "plotly", "pyarrow", "safetensors",
    "starlette", "tokenizers", "torch", "transformers", "uvicorn",
}  # fmt: skip
FOR_HELP = HEAVY | {"psutil", "rich", "xxhash"}
IMPORTED = """
import json, sys
from miles.cli.main import main
sys.argv = ["miles", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print(json.dumps(sorted(name.partition(".")[0] for name in sys.modules)), file=sys.stderr)
    sys.exit(end.code)
"""
COMMANDS = ["submit", "render", "resume", "fork", "watch", "status", "logs", "stop", "save", "checkpoints", "export"]
COMMANDS += ["report", "runs", "init", "doctor", "version", "config", "config check", "config explain", "config show"]
COMMANDS += ["container build"]


def _imported(directory: Path, *arguments: str) -> set[str]:
    command = [sys.executable, "-c", IMPORTED, *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(tmp_path: Path, command: str) -> None:
    assert _imported(tmp_path, *command.split(), "--help") & FOR_HELP == set()


@pytest.mark.parametrize("arguments", ["config check run.toml", "config show run.toml", "doctor", "runs", "version"])
def test_login_node_command_imports_nothing_heavy(directory: Path, arguments: str) -> None:
    assert _imported(directory, *arguments.split()) & HEAVY == set()
