#!/usr/bin/env bash
# Looks up known vulnerabilities of the packages in .venv at OSV (https://osv.dev), with pip-audit in a venv of its own.
# Fails if a package has one, and also if OSV cannot be reached: without an answer nothing is known to be safe.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x build/audit/bin/pip-audit ] || { .venv/bin/python -m venv build/audit && build/audit/bin/pip install -q pip-audit==2.10.1; }
exec build/audit/bin/pip-audit --path .venv/lib/python3*/site-packages --vulnerability-service osv --timeout 15 "$@"
