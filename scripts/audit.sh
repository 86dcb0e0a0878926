#!/usr/bin/env bash
# Known vulnerabilities of what is installed in .venv, from OSV (https://osv.dev): pip-audit, in a venv of its own.
# Fails when one is known, and also when OSV cannot be reached: no answer is not a good answer.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x build/audit/bin/pip-audit ] || { .venv/bin/python -m venv build/audit && build/audit/bin/pip install -q pip-audit==2.10.1; }
exec build/audit/bin/pip-audit --path .venv/lib/python3*/site-packages --vulnerability-service osv --timeout 15 "$@"
