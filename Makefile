# make demo: look at what the model can do. make lint, make test: what CI runs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2

.PHONY: setup demo test lint check

setup: $(READY)

# Exact versions, with every extra that demo and tests need.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

# make demo ARGS="--images my_pictures"
demo: setup
	$(BIN)/ddt demo $(ARGS)

# make test ARGS="tests/unit -x"; a file's tests stay in one of the two processes, each on a thread
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Before a commit: the quick half of the tests, too.
check: lint
	$(BIN)/python -m pytest tests/unit tests/architecture -q
	@find src -name "*.py" | xargs cat | wc -l | xargs echo "lines in src:"
