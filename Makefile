# The two commands: `make book` runs every chapter and renders the book; `make test` passes the tests.
PROFILE ?= toy
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
BIN     := .venv/bin

.PHONY: book test setup render export clean

book: setup
	@$(BIN)/python book/run.py --profile $(PROFILE)
	@$(BIN)/python book/render.py --profile $(PROFILE)

test: setup
	@$(BIN)/python -m pytest

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

clean:
	rm -rf _build runs
