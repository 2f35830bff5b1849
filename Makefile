.DEFAULT_GOAL := help
.PHONY: help test test-plain test-torch quick proof lint types sdist-check isas sanitize aarch64 vendor-ascend peers gpu demo clean

PYTHON ?= python3
peers := eager vllm zentorch pace ort ggml
built_from := pyproject.toml CMakeLists.txt $(shell find backends -path '*/native/*' -type f)

help:           ## what can be made
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# torch goes in first and pinned, so that nothing after it picks another build.
.venv/ready: $(built_from)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install torch==2.13.0
	.venv/bin/pip install -e '.[dev]'
	touch $@

.venv-demo/ready: $(built_from)
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install -e .
	touch $@

# One thread in each process: the tests' matrices are so small that a second one costs more than it brings.
test-plain test-torch quick proof: export OMP_NUM_THREADS = 1
# In tiles of AMX PyTorch 2.13 reads beside a row: what stands there must be finite, see docs/peers.md.
test-torch proof: export ONEDNN_MAX_CPU_ISA = AVX512_CORE_BF16

# Two processes side by side, each of which takes half of the time; what they print comes when they are done.
test: lint types  ## lint, types and all tests
	@$(MAKE) -j2 --output-sync=target --no-print-directory test-plain test-torch

test-plain: .venv/ready
	.venv/bin/pytest tests/house tests/quick tests/plain tests/onnx

# A PyTorch process can be given one out-of-tree chip only, so the emulated ones get a process apart; Triton's
# interpreter is chosen before Triton is imported, so its tests do too.
test-torch: .venv/ready
	.venv/bin/pytest tests/native tests/examples tests/processes tests/torch tests/browser
	for tests in tests/emulated*; do .venv/bin/pytest $$tests || exit 1; done
	.venv/bin/pytest tests/triton

quick: .venv/ready  ## what each commit must pass, within a minute
	.venv/bin/pytest tests/house tests/quick

proof: .venv/ready  ## what is slow and seldom tells: into tests/proof/results.json, which `make test` holds to the sources
	.venv/bin/pytest tests/proof

lint: .venv/ready  ## ruff
	.venv/bin/ruff check .

types: .venv/ready  ## mypy, strict
	.venv/bin/mypy

sdist-check: .venv/ready  ## sdist, the wheel built from it, and what that wheel installs
	rm -rf build/dist
	.venv/bin/python -m build --outdir build/dist
	.venv/bin/python .ci/check_wheel.py build/dist/*.whl

isas: .venv/ready  ## the kernels of the cpu backend at the strict level, in every instruction set that this processor runs (8 GiB)
	for isa in $$(.venv/bin/python -c "from porthal.backends.cpu import _native; print(*_native.isas())"); do \
		PORTHAL_ISA=$$isa .venv/bin/porthal conform --backend cpu --level strict --memory 8 || exit 1; done

sanitize: .venv/ready  ## the kernels of the cpu backend under the sanitizers for addresses, undefined behaviour and threads
	.venv/bin/python .ci/sanitize.py address
	.venv/bin/python .ci/sanitize.py thread

aarch64: .venv/ready  ## the kernels of the cpu backend on aarch64, emulated by qemu-user, at bring-up (needs Debian)
	.venv/bin/python .ci/aarch64.py

build/vendor/ascend/libopapi.so: tests/vendor/ascend_stub.py tests/vendor/cann.c | .venv/ready
	.venv/bin/python tests/vendor/ascend_stub.py

vendor-ascend: build/vendor/ascend/libopapi.so  ## Ascend's adapter on the vendor's own torch_npu over stubs (PyPI, gcc; 130 MB)
	.venv/bin/pytest tests/vendor

build/peers/%/ready: bench/peers/environment.sh bench/peers/requirements.txt bench/peers/%/pyproject.toml
	bash bench/peers/environment.sh $*

# Each library in an environment of its own, about 1 GB; half an hour on two quiet cores.
peers: .venv/ready $(peers:%=build/peers/%/ready)  ## other people's kernels on this CPU: conformance of each, and docs/peers.md
	.venv/bin/python .ci/peers.py run
	.venv/bin/python .ci/peers.py page

# What a lent machine is given is prepared here; there it is `python3 .ci/gpu.py run OUT`, nine minutes at most.
gpu: .venv/ready  ## carries what a GPU run needs into build/gpu, and runs each of its parts in Triton's interpreter
	.venv/bin/python .ci/gpu.py wheels
	.venv/bin/python .ci/gpu.py run --dry build/gpu/dry

demo: .venv-demo/ready  ## the demo model on this CPU, without PyTorch: text, then proof, in report.html
	.venv-demo/bin/porthal backends
	.venv-demo/bin/porthal generate "$$(printf '    def get(self, name):\n        if ')" --max-new 135
	.venv-demo/bin/porthal conform --level bring-up --html report.html
	.venv-demo/bin/porthal explain

clean:          ## remove what was made
	rm -rf .venv .venv-demo build dist report.html .mypy_cache .pytest_cache .ruff_cache .hypothesis
