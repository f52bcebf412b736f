#!/usr/bin/env bash
# Create a virtual environment (about 2 GB) in which SGLang runs on a CPU, for the contract suite:
#   tests/engines/sglang_cpu/install.sh DIRECTORY
#   MILES_SGLANG_PYTHON=DIRECTORY/bin/python pytest tests/engines/test_contract.py
set -euo pipefail
directory=${1:?usage: install.sh DIRECTORY}
here=$(cd "$(dirname "$0")" && pwd)

python3 -m venv "$directory"
pip() { "$directory/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet --requirement "$here/requirements.txt"
pip install --quiet --no-deps sglang==0.5.23 xgrammar==0.2.7 kernels==0.14.1
# A copy: building writes beside the sources.
cp -r "$here/plugin" "$directory/plugin"
pip install --quiet --no-deps "$directory/plugin"
MILES_STAND_INS=$(tr '\n' ',' <"$here/stand-ins.txt") SGLANG_USE_CPU_ENGINE=1 PYTHONPATH="$here" \
    "$directory/bin/python" -c "import sglang.srt.entrypoints.http_server"
echo "SGLang is ready: MILES_SGLANG_PYTHON=$directory/bin/python"
