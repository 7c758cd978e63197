# make demo and make test are commands of the README; each sets up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test faults gpu lint lock clean

setup: $(STAMP)

# --no-deps: the lock is complete, and pip would otherwise add pyiqa's GUI build of OpenCV.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Renders a small dataset, trains on it (Colabator, a control) and compares the models on its hidden truth.
demo: $(STAMP)
	$(BIN)/corun-ray demo demo
	$(BIN)/corun-ray run jobs/quickstart.yaml

# Two processes: one has the tests of the local Ray, which mostly wait for Ray's processes, the other computes.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --max-worker-restart 0 --durations 10 $(PYTEST)

# The fault matrix: nine faults at random moments, five seeds each (45 runs of 50 to 80 s on 2 cores).
# make faults FAULTS='--faults driver --seeds 7 8'
faults: $(STAMP)
	$(BIN)/python -m tests.faults.matrix $(FAULTS)

# What a GPU is asked for, most wanted first, in 13 minutes; results in the folder OUT.
# make gpu GPU='--device cpu --tiny' proves the same without one.
OUT ?= gpu
gpu: $(STAMP)
	$(BIN)/python docs/evidence/quarter_hour.py $(OUT) $(GPU)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Renews the locks (needs uv): complete, hashed, without hosts. The image's is the part of the other that it runs:
# versions come from the file that a lock is written to.
COMPILE := uv pip compile pyproject.toml --extra server --universal --generate-hashes --no-emit-index-url --no-header \
    --no-annotate
lock:
	$(COMPILE) --extra dev --output-file requirements.lock
	cp requirements.lock requirements-image.lock
	$(COMPILE) --output-file requirements-image.lock

clean:
	rm -rf $(VENV) demo runs
