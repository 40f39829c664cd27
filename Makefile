# The commands of the project. VENV and PYTHON can be given: make setup PYTHON=python3.12
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo lint test docs check peft-suite bench bench-adapters hub

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[test]' -c constraints.txt
	touch $@

demo: setup ## train a LoRA adapter on the embedded base and data, and use it
	PATH="$(BIN):$$PATH" accelerate launch recipes/lora_vit.py
	$(BIN)/inlay info runs/lora_vit/adapter
	$(BIN)/python recipes/predict.py --adapter runs/lora_vit/adapter --grid runs/lora_vit/sheet.png

test: setup
	$(BIN)/pytest -n logical --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: setup ## the pages of docs/ as a site in site/, from the source, without a connection
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: lint docs test ## what must be green at every commit

peft-suite: setup ## peft's own tests on inlay's methods
	$(BIN)/python tests/peft_suite/run.py -- -n logical

bench: setup ## slow measurements, with their results in tests/benchmarks/results
	$(BIN)/python tests/benchmarks/fit_speed.py
	$(BIN)/python tests/benchmarks/fit_options.py
	$(BIN)/python tests/benchmarks/frozen_blocks.py
	$(BIN)/python tests/benchmarks/fit_many.py
	$(BIN)/python tests/benchmarks/memory_plan.py
	$(BIN)/python tests/benchmarks/adapter_latency.py
	$(BIN)/python tests/benchmarks/stories260k.py
	$(BIN)/python tests/benchmarks/e2e_gpt2.py
	$(BIN)/python tests/benchmarks/eight_bit_gpt2.py
	$(BIN)/python tests/benchmarks/spatial_speed.py --edge 128
	$(BIN)/python tests/benchmarks/segment_memory.py
	$(BIN)/python tests/benchmarks/hippocampus.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/int8.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bfloat16.py
	for name in combine_error combine_speed combine_rules merge_error bank fuzz; do $(BIN)/python tests/benchmarks/$$name.py || exit 1; done

bench-adapters: setup ## beside the library adapters, whose pins need an environment of their own
	$(PYTHON) -m venv runs/adapters
	runs/adapters/bin/pip install --quiet adapters==1.3.0 torch==2.13.0
	$(BIN)/python tests/benchmarks/bottleneck_vs_adapters.py --adapters_python runs/adapters/bin/python

hub: export INLAY_AUTHOR ?= the inlay authors
hub: setup ## train again what adapters_hub holds, at the recipes' defaults
	PATH="$(BIN):$$PATH" accelerate launch recipes/lora_vit.py --output_dir runs/hub/lora_vit --overwrite
	rm -rf adapters_hub/digits-lora-vit-tiny
	cp -r runs/hub/lora_vit/adapter adapters_hub/digits-lora-vit-tiny
	PATH="$(BIN):$$PATH" accelerate launch recipes/lora_gpt2.py --output_dir runs/hub/lora_gpt2 --overwrite
	rm -rf adapters_hub/restaurants-lora-gpt2-tiny
	cp -r runs/hub/lora_gpt2/adapter adapters_hub/restaurants-lora-gpt2-tiny
	PATH="$(BIN):$$PATH" accelerate launch recipes/spatial_sam.py --output_dir runs/hub/spatial_sam --overwrite
	rm -rf adapters_hub/lesions-spatial-sam-tiny
	cp -r runs/hub/spatial_sam/adapter adapters_hub/lesions-spatial-sam-tiny
	$(BIN)/python -c "from inlay.builtin import bodies; from inlay.tasks.volumes import nifti; body = next(bodies.generate_bodies(1, seed=1)); \
		nifti.write_volume('runs/hub/scan.nii.gz', body.image, body.affine)"
	$(BIN)/inlay segment adapters_hub/lesions-spatial-sam-tiny runs/hub/scan.nii.gz -o runs/hub/mask.nii.gz \
		--montage adapters_hub/lesions-spatial-sam-tiny/example.png
	$(BIN)/inlay index adapters_hub
