"""Build an image from a definition file, by Apptainer or Singularity, whose output goes to the terminal."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from miles.cluster.containers import source_tree
from miles.errors import MilesError, RunError


def build_image(image: Path, definition: Path | None) -> None:
    """Write `image` as `definition` says; by default as `containers/miles.def` of the checkout does.

    Raises:
        RunError: the image exists, there is nothing to build from or with.
        MilesError: the build failed; what it printed says why.
    """
    if image.exists():
        raise RunError(f"{image} exists", fix="remove it, or name another file")
    # Our own definition names files from the root of the checkout; anybody else's, as Apptainer has it, from here.
    directory, definition = (Path.cwd(), definition) if definition is not None else _own_definition()
    if not definition.is_file():
        raise RunError(f"{definition}: no such file", fix="name a definition file, or leave out --def")
    # An ordinary user becomes root in a user namespace; APPTAINER_FAKEROOT does the same for a root with few rights.
    fakeroot = [] if os.geteuid() == 0 else ["--fakeroot"]
    command = [_program(), "build", *fakeroot, str(image.absolute()), str(definition.absolute())]
    done = subprocess.run(command, cwd=directory, check=False)
    if done.returncode != 0:
        fix = "see what it printed above; for space, set APPTAINER_TMPDIR and APPTAINER_CACHEDIR to a large disk"
        raise MilesError(f"the build ended with exit code {done.returncode}", fix=fix)


def _own_definition() -> tuple[Path, Path]:
    root = source_tree()
    if root is None:
        fix = "run it from a checkout of Miles (`pip install -e .`), or name your own by --def FILE"
        raise RunError("an installed Miles has no definition file", fix=fix)
    return root, root / "containers" / "miles.def"


def _program() -> str:
    for name in ("apptainer", "singularity"):
        if (found := shutil.which(name)) is not None:
            return found
    fix = "load its module, or build on a machine that has it; with Docker: containers/Dockerfile"
    raise RunError("neither apptainer nor singularity is on PATH", fix=fix)
