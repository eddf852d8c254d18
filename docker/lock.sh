#!/bin/sh
# Writes the locks of the image anew, from pyproject.toml and constraints.txt: every package that it
# installs, and what builds ours, at one version, with the hashes of its files. For CPython 3.12 on
# x86_64 Linux, with the torch that runs on CPUs and on CUDA.
set -eu
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools"
"$tools/bin/pip" install -q --disable-pip-version-check uv==0.13.9
sed -n 's/^requires = \["\(.*\)"\]$/\1/p' pyproject.toml > "$tools/build.in"

lock() {
    file=$1
    shift
    "$tools/bin/uv" pip compile -q pyproject.toml "$tools/build.in" "$@" -c constraints.txt \
        --python-version 3.12 --python-platform x86_64-manylinux_2_28 --only-binary :all: \
        --generate-hashes --no-annotate --custom-compile-command "sh docker/lock.sh" -o "$file"
}
lock docker/serve.txt --extra serve
lock docker/ui.txt --extra ui --extra remote
