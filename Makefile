# The commands of the project. VENV and PYTHON can be given: make setup PYTHON=python3.12
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# pip compiles all that it installs, in one process: here Python compiles and keeps what is imported, a third of it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo lint test docs check peft-suite bench bench-speed bench-scores bench-forget bench-gpu bench-adapters hub

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -e '.[test]' -c constraints.txt
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

# The hours are estimates for two quiet cores, added up from the single scripts.
SHARED ?= ../shared/data
RESULTS = tests/benchmarks/results

bench: bench-speed bench-scores bench-adapters ## every figure of README and docs/benchmarks: about 18 hours

bench-speed: setup ## of these, time and memory: 3 hours
	$(BIN)/python tests/benchmarks/fit_speed.py --rounds 4
	$(BIN)/python tests/benchmarks/fit_options.py --rounds 3
	$(BIN)/python tests/benchmarks/frozen_blocks.py
	$(BIN)/python tests/benchmarks/fit_many.py
	$(BIN)/python tests/benchmarks/image_loading.py
	$(BIN)/python tests/benchmarks/predict_folder.py
	$(BIN)/python tests/benchmarks/channels_last.py
	$(BIN)/python tests/benchmarks/image_start.py --images 3000
	$(BIN)/python tests/benchmarks/stream_scale.py --rounds 4
	$(BIN)/python tests/benchmarks/memory_plan.py
	$(BIN)/python tests/benchmarks/text_memory.py
	$(BIN)/python tests/benchmarks/adapter_latency.py
	$(BIN)/python tests/benchmarks/spatial_speed.py --edge 128 --threads 1
	$(BIN)/python tests/benchmarks/spatial_speed.py --edge 48 --tasks train --ways stored blocks default --steps 3 --repeats 3
	$(BIN)/python tests/benchmarks/segment_memory.py
	$(BIN)/python tests/benchmarks/combine_speed.py
	$(BIN)/python tests/benchmarks/bank.py --parts forward --rows 16 --counts 1 4 16 --rounds 2 --threads 1
	$(BIN)/python tests/benchmarks/bank.py --parts load --threads 1
	$(BIN)/python tests/benchmarks/bank.py --parts methods --blocks 2 --threads 1
	$(BIN)/python tests/benchmarks/serve_text.py --rounds 2
	$(BIN)/python tests/benchmarks/serve_http.py
	$(BIN)/python tests/benchmarks/serve_http.py --size base --parts ways --dtype bfloat16
	$(BIN)/python tests/benchmarks/serve_http.py --size tiny --parts spinning
	$(BIN)/python tests/benchmarks/serve_soak.py
	$(BIN)/python tests/benchmarks/serve_fuzz.py
	$(BIN)/python tests/benchmarks/serve_masks_scans.py
	-$(BIN)/python tests/benchmarks/serve_ray.py # needs inlay[ray]
	$(BIN)/python tests/benchmarks/serve_request.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/int8.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bfloat16.py
	$(BIN)/python tests/benchmarks/fuzz.py

bench-scores: setup ## quality and errors: 15 hours; a run that was broken off goes on, after bench-forget all is measured again
	$(BIN)/python tests/benchmarks/combine_error.py
	$(BIN)/python tests/benchmarks/combine_rules.py
	$(BIN)/python tests/benchmarks/merge_error.py
	$(BIN)/python tests/benchmarks/stories260k.py
	$(BIN)/python tests/benchmarks/e2e_gpt2.py
	$(BIN)/python tests/benchmarks/eight_bit_gpt2.py
	$(BIN)/python tests/benchmarks/hippocampus.py
	$(BIN)/python tests/benchmarks/hippocampus_clicks.py
	$(BIN)/python tests/benchmarks/mask_clicks.py
	$(BIN)/python tests/benchmarks/scan_channels.py
	$(BIN)/python tests/benchmarks/scan_atlas.py
	$(BIN)/python tests/benchmarks/scan_losses.py
	$(BIN)/python tests/benchmarks/scan_folds.py
	$(BIN)/python tests/benchmarks/mobilenet_flowers.py
	$(BIN)/python tests/benchmarks/augment_flowers.py --epochs 2 --seeds 0
	$(BIN)/python tests/benchmarks/dog_toy.py --train-options "--convolutions --epochs 300"
	$(BIN)/python tests/benchmarks/tune.py digits mr --seeds 0 1 2
	$(BIN)/python tests/benchmarks/tune.py e2e hippocampus flowers --seeds 0
	$(call compare_table,digits,quality_parameters quality_latency rates,--task builtin:digits --base builtin:vit-tiny --epochs 5)
	$(call compare_table,shapes,quality_parameters rates,--task builtin:shapes --base builtin:vit-tiny --epochs 1)
	$(call compare_table,restaurants,quality_parameters rates,--task builtin:restaurants --base builtin:gpt2-tiny --steps 60 --batch-size 8)
	$(call compare_table,families,quality_parameters rates,--task builtin:families --base builtin:gpt2-tiny --steps 80 --batch-size 8)
	$(call compare_table,nuclei,quality_parameters rates,--task $(SHARED)/nuclei_dsb2018/dev --base builtin:sam-tiny --steps 40 --batch-size 4)
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/pruning.py vit-tiny
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/pruning.py mobilenet --batch 16 \
		--base $(SHARED)/mobilenet_imagenet/hf/mobilenet_v2_1.0_224 --data $(SHARED)/flowers5/dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/pruning.py vit-small --batch 16 --data $(SHARED)/flowers5/dev
	$(call prune_table,adapters_hub/digits-lora-vit-tiny,builtin:digits,,int8_table)
	$(call prune_table,$(FLOWERS)/lora/adapter,$(FLOWERS)/data,--compensate,int8_table_mobilenet --split test)
	PATH="$(BIN):$$PATH" accelerate launch recipes/lora_sam.py --output_dir runs/lora_sam --overwrite
	PATH="$(BIN):$$PATH" accelerate launch recipes/lora_sam.py --dataset $(SHARED)/nuclei_dsb2018/dev --crop 96 \
		--output_dir runs/nuclei_lora_sam --overwrite
	$(BIN)/python recipes/combine_adapters.py --overwrite

# name, plots that the docs show, what is compared
define compare_table
$(BIN)/inlay compare $(3) --seeds 0,1,2 --output runs/compare_$(1)
cp runs/compare_$(1)/comparison.* $(RESULTS)/compare_$(1)/
for name in $(2); do cp runs/compare_$(1)/$$name.png docs/assets/compare_$(1)_$$name.png; done
endef

FLOWERS = runs/benchmark_pruning/mobilenet
# an adapter, its data, how it is pruned, the name of the table: dense, pruned and healed, and both ends in 8 bits
define prune_table
rm -rf runs/pruned runs/healed
$(BIN)/inlay prune $(1) --output runs/pruned --data $(2) $(3)
$(BIN)/inlay prune $(1) --output runs/healed --data $(2) $(3) --heal 60
OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/int8.py --table dense=$(1) pruned=runs/pruned healed=runs/healed --data $(2) --name $(4)
endef

bench-forget: ## remove the results that scripts would go on from
	rm -rf runs/benchmark_pruning runs/benchmark_tune runs/e2e runs/dog_toy runs/hippocampus_clicks runs/compare_*
	for name in hippocampus hippocampus_clicks scan_channels scan_atlas scan_losses mobilenet_flowers augment_flowers pruning_vit-tiny pruning_vit-small pruning_mobilenet dog_toy tune; do rm -f $(RESULTS)/$$name.json; done

bench-gpu: setup ## on a machine with a GPU, twice under 10 minutes
	$(BIN)/python tests/benchmarks/gpu.py --parts training
	$(BIN)/python tests/benchmarks/gpu.py --parts use

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
	$(BIN)/python -c "from inlay.builtin import bodies; from inlay.tasks.volumes.formats import write_volume; body = next(bodies.generate_bodies(1, seed=1)); \
		write_volume('runs/hub/scan.nii.gz', body.image, body.affine)"
	$(BIN)/inlay segment adapters_hub/lesions-spatial-sam-tiny runs/hub/scan.nii.gz -o runs/hub/mask.nii.gz \
		--montage adapters_hub/lesions-spatial-sam-tiny/example.png
	$(BIN)/inlay index adapters_hub
