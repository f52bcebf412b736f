"""The definition file and the Dockerfile make the same image: same base, same files, one script with one pinned set."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "containers"
INSTALLERS = r"\b(pip3?|uv|conda|apt|apt-get|dnf|yum|wget|curl)\b"


def pins(name: str) -> dict[str, str]:
    """Version by package; every line must fix one."""
    found = {}
    for line in (CONTAINERS / name).read_text().splitlines():
        if line and not line.startswith("#"):
            package, equals, version = line.partition("==")
            assert equals and re.fullmatch(r"[\w.+]+", version), f"{name}: {line!r} does not fix a version"
            found[canonicalize_name(package)] = version
    return found


def recipe(name: str) -> list[str]:
    lines = (CONTAINERS / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_both_files_run_the_one_script_and_install_nothing_else() -> None:
    definition, dockerfile = recipe("miles.def"), recipe("Dockerfile")
    command = "/opt/source/containers/install.sh /opt/source"
    assert definition[definition.index("%post") + 1 : definition.index("%environment")] == [command]
    assert [line for line in dockerfile if line.startswith("RUN")] == [f"RUN {command}"]
    for line in (*definition, *dockerfile):
        assert line.endswith(command) or not re.search(INSTALLERS, line), line


def test_both_files_begin_with_the_same_base_and_files() -> None:
    definition, dockerfile = recipe("miles.def"), recipe("Dockerfile")
    (base,) = (line.removeprefix("From: ") for line in definition if line.startswith("From:"))
    assert f"FROM {base}" in dockerfile
    copied = {line.split()[0] for line in definition[definition.index("%files") + 1 : definition.index("%post")]}
    words = [line.split()[1:-1] for line in dockerfile if line.startswith("COPY")]
    assert copied == {word for line in words for word in line}
    assert all((ROOT / name).exists() for name in copied)


def test_the_script_installs_the_pinned_set_and_resolves_nothing() -> None:
    script = (CONTAINERS / "install.sh").read_text()
    installed = re.findall(r"pip install (.*)", script)
    assert [line.split()[-1] for line in installed] == [
        '"$source/containers/requirements.txt"',
        '"$source/containers/requirements-compiled.txt"',
        '"$source"',
    ]
    assert all("--no-deps" in line for line in installed)


def test_the_set_has_what_was_chosen_and_what_miles_needs() -> None:
    locked = pins("requirements.txt")
    chosen = pins("requirements.in")
    assert {name: locked.get(name) for name in chosen} == chosen
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *extras["gpu"], *extras["report"], *extras["tensorboard"], *extras["wandb"]]
    for need in map(Requirement, needs):
        version = locked.get(canonicalize_name(need.name))
        assert version is not None, f"{need.name} is missing"
        assert need.specifier.contains(version), f"{need}: {version} is pinned"


def test_transformer_engine_is_of_one_version() -> None:
    locked = pins("requirements.txt") | pins("requirements-compiled.txt")
    versions = {locked[f"transformer-engine{part}"] for part in ("", "-cu13", "-torch")}
    assert len(versions) == 1
