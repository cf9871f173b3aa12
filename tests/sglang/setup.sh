#!/usr/bin/env bash
# Makes the environment of the real SGLang that tests marked `sglang` talk to. usage: setup.sh [DIR], default .venv-sglang
# Two to three minutes and 2.3 GB, once: it is kept until requirements.txt or this file changes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -eq 0 ] && [ -n "${MEGASAPO_SGLANG_PYTHON:-}" ]; then
  "$MEGASAPO_SGLANG_PYTHON" -c 'import sys; from importlib.metadata import version; print("sglang", version("sglang"), "in", sys.prefix)'
  exit
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
  rm -rf "$dir"
fi
echo "setup.sh: installing SGLang into $dir"
"$python" -m venv "$dir"
pip() { "$dir/bin/python" -m pip --disable-pip-version-check install -q "$@"; }
pip "$torch"
pip -r "$here/requirements.txt"
# without their dependencies: those ask for CUDA packages; what the server needs of them is in requirements.txt
pip --no-deps sglang==0.5.21 xgrammar==0.2.7
echo "$stamp" >"$dir/.installed"
