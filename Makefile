# The two commands: `make book` runs every chapter and renders the book; `make test` passes the tests.
# Beside them: `make bench` measures ours against diffusers' models (20 minutes), `make bench-fidelity` for five hours.
PROFILE ?= toy
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
BIN     := .venv/bin

.PHONY: book test setup render export bench bench-fidelity clean

book: setup
	@$(BIN)/python book/run.py --profile $(PROFILE)
	@$(BIN)/python book/render.py --profile $(PROFILE)

test: setup
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile    # the chapters, one after the other, beside the rest

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	@echo "setting up .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

render: setup
	@$(BIN)/python book/render.py --profile $(PROFILE)

export: setup
	@$(BIN)/python book/export.py

# BENCH="--rows 1 --forms eager": some rows; "--tiny": see that it runs; "--keep": write the result into the book
bench: .venv/ready-bench
	@$(BIN)/python tests/benchmarks/bench.py $(BENCH)

bench-fidelity: .venv/ready-bench
	@$(BIN)/python tests/benchmarks/fidelity.py $(BENCH)

.venv/ready-bench: .venv/ready tests/benchmarks/requirements.txt
	@echo "setting up diffusers (a minute, once)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r tests/benchmarks/requirements.txt
	@touch $@

clean:
	rm -rf _build runs
