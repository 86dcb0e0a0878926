# The real ones start as many processes as there are cores; two of them at once would wait for each other.
UNIT := .venv/bin/python -m pytest -m "not e2e" -n 2
E2E := .venv/bin/python -m pytest -m e2e

.PHONY: setup demo test unit chaos check bench audit mlflow clean

setup:            ## .venv with everything in it; nothing to do when nothing changed
	@bash scripts/setup.sh

demo: setup       ## the main job: a small policy learns, seen here and in MLflow
	.venv/bin/dvpo train --config demo

test: setup check ## everything: checks, unit tests, real vLLM, Ray and MLflow
	@status=0; $(UNIT) || status=1; $(E2E) || status=1; exit $$status

unit: setup       ## the fast tests only
	$(UNIT)

chaos: setup      ## a hundred faults in one run, and what it kept of its promises (35 to 45 minutes)
	.venv/bin/python -m tests.chaos.long $(ARGS)

check: setup      ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: setup      ## speed and memory, as JSON
	.venv/bin/python -m tests.bench

audit: setup      ## known vulnerabilities of what is installed; needs the network
	@bash scripts/audit.sh

mlflow: setup     ## open the runs in a browser, on loopback
	@echo "runs, side by side: http://127.0.0.1:$(or $(PORT),5000)/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"
	.venv/bin/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port $(or $(PORT),5000)

clean:
	rm -rf .venv runs
