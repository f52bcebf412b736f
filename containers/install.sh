#!/bin/bash
# install.sh SOURCE: what both miles.def and the Dockerfile run: the pinned set, then Miles from SOURCE, into /opt/miles.
# Needs Ubuntu 24.04 with the CUDA 13.0 toolkit (nvcc is used here, and at run time by SGLang's kernels).
set -euo pipefail
source=$1
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

apt-get update -qq
apt-get install -y -qq --no-install-recommends build-essential git ibverbs-providers libibverbs1 libnuma1 librdmacm1 \
    ninja-build numactl python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/miles
PATH=/opt/miles/bin:$PATH
# Every version is written down, so nothing is left to resolve.
pip install --no-deps -r "$source/containers/requirements.txt"

# The headers of cuDNN and NCCL are those that torch brings.
nvidia=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])')
NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS:-"80;90"} \
    CPATH=$nvidia/cu13/include:$nvidia/cudnn/include:$nvidia/nccl/include \
    pip install --no-deps --no-build-isolation -r "$source/containers/requirements-compiled.txt"

pip install --no-deps --no-build-isolation "$source"
pip check
python3 -c 'import miles, torch, sglang, megatron.core, transformer_engine.common'
