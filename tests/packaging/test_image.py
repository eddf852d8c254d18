"""What the image installs: exactly what it needs, in the tested versions, each file by its hash."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
EXTRAS = {"serve": ["serve"], "ui": ["ui", "remote"]}
IMAGE = {
    "python_version": "3.12", "python_full_version": "3.12.14", "sys_platform": "linux",
    "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
    "implementation_name": "cpython", "platform_python_implementation": "CPython",
}  # fmt: skip
CUDA = re.compile("nvidia-.+|cuda-.+|triton")
"""What torch alone brings, for CUDA; a torch for CPUs does not know of it."""
_ENTRY = re.compile(r"([a-z0-9-]+)==([\w.]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def locked(text: str) -> dict[str, str]:
    """Return the versions of a lock, every line of which must belong to an entry with hashes."""
    body = re.sub(r"(?m)^#.*\n", "", text)
    rest = _ENTRY.sub("", body)
    assert rest == "", f"without a hash: {rest[:200]}"
    entries = _ENTRY.findall(body)
    assert len({name for name, *_ in entries}) == len(entries)
    return {name: version for name, version, _ in entries}


def named(lock: str) -> list[Requirement]:
    """Return what pyproject.toml asks for in an image."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    lines += [line for extra in EXTRAS[lock] for line in extras[extra]]
    return [Requirement(line) for line in lines]


def check_versions(lock: str, text: str) -> None:
    versions = locked(text)
    for requirement in named(lock):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])
    tested = (ROOT / "constraints.txt").read_text()
    for name, version in re.findall(r"(?m)^([\w.-]+)==(.+)$", tested):
        assert versions.get(canonicalize_name(name), version) == version, name


def check_names(lock: str, text: str) -> None:
    """Follow what the installed packages require, which must be the locked ones for that."""
    versions = locked(text)
    needed: set[str] = set()
    pending = [(requirement, "") for requirement in named(lock)]
    seen = set()
    while pending:
        requirement, extra = pending.pop()
        marker = requirement.marker
        if marker is not None and not marker.evaluate({**IMAGE, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        needed.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen and not CUDA.fullmatch(name):
                seen.add((name, extra))
                requires = importlib.metadata.requires(name) or []
                pending += [(Requirement(line), extra) for line in requires]
    torch_alone = {name for name in versions.keys() | needed if CUDA.fullmatch(name)}
    assert needed - torch_alone == versions.keys() - torch_alone


@pytest.fixture(params=sorted(EXTRAS))
def lock(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def text(lock: str) -> str:
    return (ROOT / "docker" / f"{lock}.txt").read_text()


def is_tested_set(text: str) -> bool:
    def installed(name: str) -> str:
        try:
            return importlib.metadata.version(name).partition("+")[0]  # of a torch for CPUs
        except importlib.metadata.PackageNotFoundError:
            return "none"

    versions = locked(text)
    return all(installed(n) == v for n, v in versions.items() if not CUDA.fullmatch(n))


def test_lock_has_the_tested_versions_and_a_hash_of_every_file(lock: str, text: str) -> None:
    """If not: sh docker/lock.sh."""
    check_versions(lock, text)


def test_lock_names_what_the_image_needs_and_nothing_else(lock: str, text: str) -> None:
    if not is_tested_set(text):
        pytest.skip("what packages of other versions require is not known here")
    check_names(lock, text)


def test_control_lock_without_a_hash_a_package_or_the_tested_version_is_noticed() -> None:
    text = (ROOT / "docker" / "serve.txt").read_text()
    first_hash = r"(h11==[\d.]+) \\\n(.*\n)+?(?=[a-z])"
    for change in (r"\1\n", r"\1 --hash=md5:0\n"):
        with pytest.raises(AssertionError, match="without a hash"):
            locked(re.sub(first_hash, change, text))
    with pytest.raises(AssertionError):
        check_versions("serve", text.replace("fastapi==", "fastapi==0.1"))
    with pytest.raises(AssertionError, match="anyio"):
        check_versions("serve", text.replace("anyio==", "anyio==1"))
    with pytest.raises(KeyError, match="h11"):
        check_versions("serve", re.sub(first_hash, "", text))
    if is_tested_set(text):
        for change in ("", r"\g<0>unneeded==1 \\\n    --hash=sha256:" + 64 * "0" + r"\n"):
            with pytest.raises(AssertionError):
                check_names("serve", re.sub(first_hash.replace("h11", "anyio"), change, text))


def test_image_is_made_of_a_digest_and_of_locked_files_alone() -> None:
    (base,) = re.findall(r"(?m)^FROM (.*)$", DOCKERFILE)
    assert re.fullmatch(r"python:3\.12-slim@sha256:[0-9a-f]{64}", base)
    commands = re.findall(r"pip install (?:[^\n&]|\\\n)*", DOCKERFILE)
    assert len(commands) == 2
    assert "--require-hashes --only-binary :all:" in commands[0]
    assert "--no-deps --no-index --no-build-isolation /src" in commands[1]
    assert not re.search("curl|wget|apt|ADD ", DOCKERFILE)


def test_images_of_the_recipes_have_a_lock() -> None:
    (default,) = re.findall(r"(?m)^ARG LOCK=(.*)$", DOCKERFILE)
    assert default == "serve"
    services = yaml.safe_load((ROOT / "recipes/vllm/compose.yaml").read_text())["services"]
    assert services["ui"]["build"]["args"]["LOCK"] in EXTRAS
    assert sorted(file.stem for file in (ROOT / "docker").glob("*.txt")) == sorted(EXTRAS)
