# Short names for common commands. The presets in CMakePresets.json do the work.
PRESET ?= cpu
TEST_JOBS ?= 2
BUILD := build/$(PRESET)

.DEFAULT_GOAL := help
.PHONY: help serve setup python-env build test test-long test-asan test-tsan test-gpu \
        test-gpu-accuracy test-gpu-e2e test-gpu-faults test-gpu-transformers test-poet-bf16 \
        test-quantize-shapes test-calibrate-shapes quality cuda-check bundle format format-check tidy bench bench-gpu \
        bench-gpu-shapes bench-scheduling build-cuda clean \
        fuzz fuzz-smoke test-faults

help:  ## Print this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

serve: setup $(BUILD)/build.ninja  ## Build what is needed and serve the demo model on port 8180
	@ninja -C $(BUILD) programs
	@exec $(BUILD)/bin/wintserve serve --model models/poet --port 8180 --metrics-port 8181 \
	  --engine-worker-queue-port 8182 --cache-queue-port 8183 --tensor-parallel-size 1 \
	  --max-model-len 32768 --use-cudagraph --enable-prefix-caching --enable-chunked-prefill \
	  --max-num-seqs 256

setup:  ## Install the Debian packages that are missing
	@tools/setup/install_packages.sh

python-env: setup
	@tools/setup/python_env.sh

build: setup $(BUILD)/build.ninja  ## Build everything (PRESET=cpu, cuda, asan or tsan)
	@ninja -C $(BUILD)

# Ninja configures again by itself when a CMakeLists.txt changes.
build/%/build.ninja:
	cmake --preset $*

test: build python-env cuda-check  ## Build, compile every header alone, run all tests but those that need a GPU
	@ninja -C $(BUILD) check_headers
	ctest --preset $(PRESET) -j$(TEST_JOBS) --no-tests=error -LE gpu

# The CUDA code for one architecture, wherever there is a toolkit; a GPU is not needed for that.
NVCC := $(or $(shell command -v nvcc), $(wildcard /usr/local/cuda/bin/nvcc))
cuda-check: setup
ifeq ($(NVCC),)
	@echo "cuda-check: no CUDA toolkit here (nvcc), so the CUDA backend is not compiled; the CPU is tested"
else
	@test -f build/cuda-check/build.ninja || cmake --preset cuda-check
	@ninja -C build/cuda-check cuda_objects benchmarks check_headers
endif

# From the bundle, so that what is tested is what is shipped.
test-gpu: setup  ## Tests that need a GPU, on this machine's
	@tests/gpu/run --find-gpu
	@test -f build/cuda/build.ninja || cmake --preset cuda
	@ninja -C build/cuda programs gpu_tests
	@tools/bundle build/cuda --gpu-tests
	@tests/gpu/run build/cuda/bundle

test-gpu-e2e: CUDA_TARGETS := programs
test-gpu-e2e: build-cuda python-env  ## The end-to-end tests with the model on this machine's GPUs
	WINTSERVE_BIN=build/cuda/bin WINTSERVE_DEVICE=cuda PYTHONPATH=tests/e2e \
	  build/venv/bin/python -m pytest -q -p no:cacheprovider tests/e2e

test-gpu-faults: CUDA_TARGETS := programs device_fault nccl_fault
test-gpu-faults: build-cuda python-env  ## Two GPUs: ranks that die or whose device fails; writes docs/FAULTS_GPU.md
	WINTSERVE_BIN=build/cuda/bin WINTSERVE_DEVICE=cuda PYTHONPATH=tests/e2e PYTHONDONTWRITEBYTECODE=1 \
	  build/venv/bin/python -m pytest -v -s -p no:cacheprovider -m gpu --fault-report build/cuda/faults.json $(FAULTS) \
	  tests/faults; code=$$?; tests/faults/report build/cuda/faults.json > docs/FAULTS_GPU.md; exit $$code

CUDA_TARGETS :=
build-cuda: setup
	@tests/gpu/run --find-gpu
	@test -f build/cuda/build.ninja || cmake --preset cuda
	@ninja -C build/cuda $(CUDA_TARGETS)

test-gpu-accuracy: CUDA_TARGETS := model_outputs
test-gpu-accuracy: build-cuda  ## The demo model on this machine's GPU against the CPU backend
	@tools/setup/python_env.sh build/accuracy-venv tests/accuracy/requirements.txt
	@build/accuracy-venv/bin/python tests/accuracy/check_demo_model --json build/cuda/accuracy.json

# PYTHON has torch, which is too large to install for one check.
test-gpu-transformers: CUDA_TARGETS := model_outputs
test-gpu-transformers: build-cuda  ## Checkpoints on the GPU against PYTHON's transformers; MODEL=DIR: poet-bf16
	@$(or $(PYTHON),python3) tests/accuracy/check_transformers $(if $(MODEL),--poet '$(MODEL)') \
	  --json build/cuda/transformers.json

bundle: setup  ## Programs with CUDA, their libraries and the demo model as build/cuda/wintserve-*.tar.xz
	@test -f build/cuda/build.ninja || cmake --preset cuda
	@ninja -C build/cuda programs
	@tools/bundle build/cuda --full
	@tools/bundle build/cuda

# Each part prints its own summary; a failing seed prints the command that replays it.
test-long: setup $(BUILD)/build.ninja  ## 10,000 seeds of the simulator (tests/simulation), on all cores
	@ninja -C $(BUILD) simulation_test
	seq 1 500 9501 | xargs -P "$$(nproc)" -I FIRST env SIMULATION_FIRST_SEED=FIRST \
	  SIMULATION_SEEDS=500 timeout 1800 $(BUILD)/tests/simulation_test \
	  --gtest_filter=Simulation.KeepsEveryInvariant

test-asan: python-env  ## Unit tests with the address and undefined-behaviour sanitizers
	$(MAKE) build PRESET=asan
	ctest --preset asan -j$(TEST_JOBS) --no-tests=error

test-tsan: python-env  ## Unit tests with the thread sanitizer
	$(MAKE) build PRESET=tsan
	ctest --preset tsan -j$(TEST_JOBS) --no-tests=error

# FAULTS: options of pytest and of tests/faults/conftest.py, like `-k cache --kills 20`.
FAULTS :=
# Without it all run, and nothing of earlier runs stays in the file.
test-faults: build python-env  ## Real processes that die, hang or meet hostile peers; writes docs/FAULTS.md
	@$(if $(FAULTS),,rm -f $(BUILD)/faults.json)
	WINTSERVE_BIN=$(BUILD)/bin PYTHONPATH=tests/e2e PYTHONDONTWRITEBYTECODE=1 build/venv/bin/python -m pytest -q \
	  -p no:cacheprovider -m "not gpu" --fault-report $(BUILD)/faults.json $(FAULTS) tests/faults; code=$$?; \
	  tests/faults/report $(BUILD)/faults.json > docs/FAULTS.md; exit $$code

# What libFuzzer finds stays in build/fuzz; tests/fuzz/run says how to take it over.
SECONDS ?= 600
fuzz:  ## Each fuzz target (tests/fuzz) for SECONDS=600, with clang's libFuzzer and sanitizers
	@tools/setup/install_packages.sh fuzz
	@test -f build/fuzz/build.ninja || cmake --preset fuzz
	@ninja -C build/fuzz fuzz_targets
	@tests/fuzz/run --seconds $(SECONDS)

fuzz-smoke:  ## The same for a few seconds
	@$(MAKE) fuzz SECONDS=5

# Large files and minutes of both cores; EXPERTS=64 for a whole layer of the 300B model.
test-quantize-shapes: setup $(BUILD)/build.ninja  ## A layer of the 21B's and one of the 300B's shape to WINT2, then on 1, 2 and 4 ranks
	@ninja -C $(BUILD) quantize_shapes_test
	$(BUILD)/tests/quantize_shapes_test $(BUILD)/bin/wintserve-quantize --large

# Two core-hours as it stands; EXPERTS=1 CALIBRATION_TOKENS=2048 for a shorter look.
test-calibrate-shapes: setup $(BUILD)/build.ninja  ## A layer of the 300B's shape with calibration, within 16 GiB
	@ninja -C $(BUILD) quantize_shapes_test
	$(BUILD)/tests/quantize_shapes_test $(BUILD)/bin/wintserve-quantize --calibrate

test-poet-bf16: build  ## Tests on the bfloat16 demo checkpoint in MODEL=DIR, which is not in the repository
	@test -f '$(MODEL)/config.json' || \
	  { echo "test-poet-bf16: MODEL='$(MODEL)' has no config.json; give MODEL=DIR" >&2; exit 2; }
	$(BUILD)/tests/ernie45_test --model='$(abspath $(MODEL))' --golden=tests/golden/poet-bf16.json

# QUALITY: further options of tests/accuracy/quality, like `--only wint8` or `--device cuda`.
QUALITY :=
quality: setup $(BUILD)/build.ninja  ## Every kind of quantised checkpoint of MODEL=DIR (BF16), measured on EVAL=DIR; writes docs/QUALITY.md
	@ninja -C $(BUILD) programs
	@tests/accuracy/quality --model '$(MODEL)' --evals '$(EVAL)' --bin $(BUILD)/bin --work build/quality \
	  --json build/quality/quality.json --write docs/QUALITY.md $(QUALITY)

format: setup  ## Format every C++ file in place
	@tools/format

format-check: setup  ## Name what `make format` would change
	@tools/format --check

tidy: build  ## Run clang-tidy over what differs from the main branch (TIDY=--all: over everything)
	@tools/tidy $(TIDY)

bench: build  ## Every micro-benchmark, then the rates of a running server (bench/serving)
	@for program in kernels_bench sampling_bench step_overhead_bench; do \
	  $(BUILD)/bench/$$program || exit 1; done
	@bench/serving $(BUILD)

bench-gpu: CUDA_TARGETS := model_rates matmul_cuda_bench attention_cuda_bench operators_cuda_bench \
                          all_reduce_cuda_bench
bench-gpu: build-cuda  ## The demo model's rates and the time of every operator on this machine's GPU
	@build/cuda/bench/model_rates --device cuda
	@build/cuda/bench/matmul_cuda_bench
	@build/cuda/bench/attention_cuda_bench
	@build/cuda/bench/operators_cuda_bench
	@if [ "$$(nvidia-smi -L | wc -l)" -ge 2 ]; then build/cuda/bench/all_reduce_cuda_bench; fi

bench-gpu-shapes: CUDA_TARGETS := programs load_generator
bench-gpu-shapes: build-cuda  ## The published models' shapes with dummy weights through HTTP; needs 110 GB of a GPU's memory
	@for shape in 300b-a47b-wint2 21b-a3b-wint2; do \
	  bench/full_size --model models/shapes/ernie-4.5-$$shape || exit 1; done

bench-scheduling: build  ## Batching and prefix cache through HTTP: JSON and plot in build/cpu
	@tools/setup/python_env.sh build/bench-venv bench/requirements.txt
	@build/bench-venv/bin/python bench/scheduling --build $(BUILD)

clean:  ## Remove the build directories of all presets, keep the Python environment
	rm -rf build/cpu build/cuda build/cuda-check build/asan build/tsan build/fuzz
