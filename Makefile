# make          install everything into .venv (CPU torch on a machine without GPU)
# make demo     the whole flow on this machine: capture, train, evaluate, report
# make test     the whole test suite          make test-fast   a minute of it, from every room
# make check   format, lint, types, layers, docs in sync
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.saekit-installed
WORKERS ?= 2
# Tests share the cores between workers: one thread each is faster than two that wait for each other.
# Each worker goes through its half and then takes from the other's: what a module prepares, it prepares once.
THREADS ?= 1

.PHONY: fuzz chance coverage verdicts setup demo test test-fast check fmt bench parity families kills docs clean study-transfer study-classify study-seeds study-progressive
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt .ci/install
	PYTHON="$(PYTHON)" .ci/install $(VENV)
	@touch $@

demo: $(STAMP)
	$(BIN)/saekit demo --out $(OUT)

test: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test-fast: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "fast and not slow" tests

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_layers.py tests/test_docs.py
	$(BIN)/python docs/refresh.py --check

fmt: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python docs/refresh.py

# Against the peers, which get an environment of their own. BENCH="step encode" runs some, BENCH_OPTIONS=--quick a little.
BENCH ?= quality parity step encode growth seeds extract match rows imports linear candidates explain one_rank
bench: $(STAMP)
	benchmarks/peers.sh
	@for name in $(BENCH); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py $(BENCH_OPTIONS) || exit 1; done
	@case " $(BENCH) " in *" step "*) for kind in --avx2 "--avx2 --vnni" --floor; do $(BIN)/python benchmarks/step.py $$kind $(BENCH_OPTIONS) || exit 1; done;; esac

# SAEs of every class of the other libraries, written by their own code, read here and compared, and back.
parity: $(STAMP)
	benchmarks/peers.sh
	$(BIN)/python benchmarks/formats.py

# Every text and vision family of transformers, tiny and random: writes docs/models.md. FAMILIES="bloom vit_mae" some of them.
families: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py $(FAMILIES)

# Every command that writes, killed at every write event. KILLS="train capture" some of them.
kills: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kills.py $(KILLS)

# Damaged files of every kind that saekit reads: an error of its own, or read; nothing else. MUTATIONS=10000 for all of it.
MUTATIONS ?= 2000
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --mutations $(MUTATIONS)

# How often intervals hold the truth, and verdicts are right, by simulation.
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/interval_coverage.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/real_coverage.py

# How often are verdicts wrong, after the correction? Simulated differences, and distributions of importances.
verdicts: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/verdict_simulation.py

# Classification where there is nothing to know: families at chance, false verdicts, error rate of the leak check.
chance: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/classification_chance.py

# Small SAEs from large ones: pruned, nested, trained apart. A run that was stopped goes on. STUDY_OPTIONS=--quick a little of it.
study-progressive: $(STAMP)
	$(BIN)/python studies/progressive/run.py $(STUDY_OPTIONS)

# Are SAE features useful for classification, and what do they cost? STUDY_OPTIONS=--quick a little of it.
study-classify: $(STAMP)
	$(BIN)/python studies/classify/run.py $(STUDY_OPTIONS)
	$(BIN)/python studies/classify/context.py $(STUDY_OPTIONS)
	$(BIN)/python studies/classify/beat_dense.py $(STUDY_OPTIONS)

# Do seeds of one SAE find the same latents, and what steadies them? About 100 minutes; goes on where it stopped.
study-seeds: $(STAMP)
	$(BIN)/python studies/seeds/run.py --out runs/seeds --write $(STUDY_OPTIONS)
	$(BIN)/python studies/seeds/stabilizers.py --out runs/stabilizers --write $(STUDY_OPTIONS)

# Do SAE features carry over to another language, model, seed, to images? STUDY_OPTIONS=--quick a little of it.
study-transfer: $(STAMP)
	$(BIN)/python studies/transfer/run.py $(STUDY_OPTIONS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
