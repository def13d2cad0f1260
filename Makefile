# each target sets up what it needs, once

PYTHON ?= python3
PY = .venv/bin/python
DATA = data/shakespeare_char/val.bin
TOKENIZERS = data/.cache/all

.PHONY: demo test lint clean

demo: out-demo/trained   # a small GPT on Shakespeare, trained on the CPU in about 2 minutes
	$(PY) sample.py --out_dir=out-demo --device=cpu --num_samples=3 --max_new_tokens=300

test: lint $(DATA) $(TOKENIZERS)
	$(PY) -m pytest -n 2

lint: .venv/installed-dev
	$(PY) -m ruff check

clean:   # what the targets above made; checkpoints of your own runs stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis out-demo

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

$(DATA): data/shakespeare_char/prepare.py | .venv/installed
	$(PY) data/shakespeare_char/prepare.py

$(TOKENIZERS): dataset.py | .venv/installed   # before tests in two processes look for them at once
	$(PY) -c "import dataset; [dataset.BPETokenizer(name) for name in dataset.BPE_FILES]"
	touch $@

out-demo/trained: config/train_shakespeare_char_cpu_fast.py $(DATA) | .venv/installed
	$(PY) train.py config/train_shakespeare_char_cpu_fast.py --out_dir=out-demo
	touch $@
