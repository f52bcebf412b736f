"""Tests that compute in their own process do so as Miles' processes do."""

import os

from miles.cluster.cpu import cpu_environment

# Before torch is imported.
os.environ.update(
    {key: value for key, value in cpu_environment(threads=1, processes=1, cores=1).items() if "MKL" in key}
)
