"""Tests that compute in their own process do so as Miles' processes do."""

import os

from miles.cluster.cpu import cpu_environment

os.environ["MKL_CBWR"] = cpu_environment(threads=1, processes=1, cores=1)["MKL_CBWR"]  # before torch is imported
