# Each target works in the active environment if that has a suitable torch, else in .venv (see scripts/environment.sh).
# Without make: the README has the plain commands.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-lowest style quality docs publish

# Where `make demo` writes. A finished run is left alone: the new one gets a folder with the time in its name. An interrupted one goes on.
OUT ?= outputs/digits
# Further arguments for pytest: make test ARGS="-k posterior"
ARGS ?=

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo: ## train on the 8x8 digits, then evaluate the checkpoint in a new process (outputs/digits)
	@python="$$(scripts/environment.sh train,test)"; \
	out="$(OUT)"; resume=""; \
	if [ -e "$$out/model_index.json" ]; then \
		out="$$out-$$(date +%Y%m%d-%H%M%S)"; echo "$(OUT) exists already: writing to $$out"; \
	elif ls -d "$$out"/checkpoint-* >/dev/null 2>&1; then \
		resume="--resume_from_checkpoint latest"; echo "$(OUT) was interrupted: going on with it"; \
	elif [ -e "$$out" ]; then resume="--overwrite_output_dir"; fi; \
	"$$python" training/train.py --output_dir "$$out" $$resume; \
	"$$python" training/evaluate.py --checkpoint "$$out"

test: ## the test suite
	@python="$$(scripts/environment.sh train,test)"; "$$python" -m pytest $(ARGS)

test-slow: ## the tests that take longer
	@python="$$(scripts/environment.sh train,test)"; "$$python" -m pytest -m slow $(ARGS)

test-lowest: ## the test suite in a fresh .venv-lowest, every dependency at its lower bound
	@python="$${PYTHON:-python3}"; rm -rf .venv-lowest; "$$python" -m venv .venv-lowest; \
	.venv-lowest/bin/python -m pip install --quiet -e ".[train,test]" -c constraints-lowest.txt; \
	.venv-lowest/bin/python -m pytest $(ARGS)

style: ## rewrite the code in the project's style
	@python="$$(scripts/environment.sh quality)"; \
	"$$python" -m ruff check --fix .; \
	"$$python" -m ruff format .

quality: ## lint, formatting and types, changing nothing
	@python="$$(scripts/environment.sh quality)"; \
	"$$python" -m ruff check .; \
	"$$python" -m ruff format --check .; \
	"$$python" -m mypy

docs: ## the pages and the API reference, into build/docs; every warning is an error
	@python="$$(scripts/environment.sh docs)"; "$$python" -m mkdocs build --strict

publish: export NAMESPACE := $(value NAMESPACE)
publish: ## push the models of model_cards/ to the Hub: make publish NAMESPACE=me (ARGS="--private --tag v1.0")
	@test -n "$$NAMESPACE" || { echo "say where: make publish NAMESPACE=your-name" >&2; exit 2; }; \
	python="$$(scripts/environment.sh train)"; "$$python" scripts/publish.py "$$NAMESPACE" $(ARGS)
