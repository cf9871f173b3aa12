#!/usr/bin/env bash
# A real SGLang server on a CPU (AMX not needed), for tests. usage: launch.sh HF_DIR PORT KEY_FILE [flags...]
# MEGASAPO_SGLANG_PYTHON: the interpreter of an environment made by setup.sh; default: .venv-sglang of this checkout.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${MEGASAPO_SGLANG_PYTHON:-$here/../../.venv-sglang/bin/python}
if [ ! -x "$python" ]; then
  echo "launch.sh: no SGLang environment at $python: run tests/sglang/setup.sh" >&2
  exit 2
fi
model=$1 port=$2 key=$3
shift 3
export SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 PYTHONPATH="$here/path"
# without --max-total-tokens the KV cache takes half of the machine's memory
exec "$python" "$here/../../megasapo/rollout/sglang_with_key.py" "$key" --model-path "$model" --host 127.0.0.1 --port "$port" \
  --device cpu --attention-backend torch_native --disable-overlap-schedule --skip-server-warmup \
  --max-total-tokens 4096 --max-running-requests 16 "$@"
