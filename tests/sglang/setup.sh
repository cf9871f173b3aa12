#!/usr/bin/env bash
# Makes the environment of the real SGLang that tests marked `sglang` talk to. usage: setup.sh [DIR], default .venv-sglang
# Two to three minutes and 2.3 GB, once; when requirements.txt or this file changes, only what is missing is added.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -eq 0 ] && [ -n "${MEGASAPO_SGLANG_PYTHON:-}" ]; then
  exec "$MEGASAPO_SGLANG_PYTHON" -c '
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    print("sglang", version("sglang"), "and sglang-router", version("sglang-router"), "in", sys.prefix)
except PackageNotFoundError as e:
    sys.exit(f"setup.sh: {e.name} is not installed in {sys.prefix}")'
fi
dir=${1:-$here/../../.venv-sglang}
python=${PYTHON:-python3}
# SGLang 0.5.21 pins this torch. An index that offers its CPU build saves several GB; PyPI's CUDA build works as well.
torch=${SGLANG_TORCH:-torch==2.13.0}
stamp=$( (cat "$here/requirements.txt" "$here/setup.sh"; "$python" --version; echo "$torch") | sha256sum | cut -d' ' -f1)
if [ -f "$dir/.installed" ] && [ "$(cat "$dir/.installed")" = "$stamp" ]; then
  exit
fi
if [ -e "$dir" ]; then
  if [ ! -f "$dir/pyvenv.cfg" ]; then
    echo "setup.sh: $dir exists and is no virtual environment: name another directory" >&2
    exit 2
  fi
  if [ "$("$dir/bin/python" --version 2>&1)" != "$("$python" --version)" ]; then
    rm -rf "$dir"
  fi
fi
echo "setup.sh: installing SGLang into $dir"
[ -e "$dir" ] || "$python" -m venv "$dir"
pip() { "$dir/bin/python" -m pip --disable-pip-version-check install -q "$@"; }
pip "$torch"
pip -r "$here/requirements.txt"
# without their dependencies: those ask for CUDA packages; what servers and router need of them is in requirements.txt
pip --no-deps sglang==0.5.21 xgrammar==0.2.7 sglang-router==0.3.2
echo "$stamp" >"$dir/.installed"
