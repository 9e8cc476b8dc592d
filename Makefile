# `make demo` shows the system at work, `make test` proves it; each sets up what is missing.

# Any Python from 3.11 on. TORCH is installed first and alone: a looser range would resolve to another build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BUF_VERSION := 1.75.0

BIN := .venv/bin
INSTALLED := .venv/.installed
# What the interpreter runs in CI: the triton that goes with this torch on a GPU.
TRITON ?= triton==3.7.1
WITH_TRITON := .venv/.triton
IN_TEST := not slow and not gpu and not deploy and not triton and not aot
STUBS := loraplex/v1/types_pb2.py
BUF := tools/buf-$(BUF_VERSION)/node_modules/.bin/buf
BASELINE := released/v1.txtpb
CHART := .venv-chart/.installed
CHECKOV := .venv-checkov/bin/checkov
NODE_EXAMPLE := examples/node/node_modules/.package-lock.json

.DEFAULT_GOAL := help
.PHONY: help install stubs demo run demo-model check test test-clients test-rules fuzz bench bench-full bench-ablations bench-peers bench-report bench-scheduler bench-fairness bench-store tools bench-kernels release-protos clean
.PHONY: test-triton aot-table
.PHONY: test-memory test-slow bench-memory
.PHONY: test-dashboards test-chart images bench-scrape

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create .venv, install the tree into it, compile the CPU kernels; quick when nothing changed
	@$(BIN)/python -m kernels.build

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt '$(TORCH)'
	$(BIN)/pip install -c constraints.txt -e '.[server,worker,test]'
	touch $@

stubs: $(STUBS) ## Generate the typed gRPC stubs into loraplex/v1

$(STUBS): $(wildcard protos/loraplex/v1/*.proto) protos/generate.py | $(INSTALLED)
	$(BIN)/python protos/generate.py

demo: install stubs ## Start the four services, stream from every demo adapter at once, check the answers, stop
	$(BIN)/python -m examples.demo

run: install stubs ## Serve the demo model and its adapters until Ctrl-C
	$(BIN)/loraplex up --model examples/demo_model/base --model-name loraplex-demo --adapters examples/demo_model/adapters

demo-model: install ## Train the demo model and its adapters again (up to an hour on two cores)
	$(BIN)/python examples/demo_model/train.py

check: install stubs tools ## Lint, types, import rules, protos
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BUF) lint && ../$(BUF) format -d --exit-code && ../$(BUF) breaking --against $(BASELINE)

test: install stubs ## Run the tests on two processes; ARGS goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m '$(IN_TEST)' $(ARGS)

$(WITH_TRITON): | $(INSTALLED)
	$(BIN)/pip install -c constraints.txt --no-deps '$(TRITON)'
	touch $@

test-triton: install stubs $(WITH_TRITON) ## Triton kernels in the interpreter and compiled ahead of time; no GPU needed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m triton $(ARGS)
	$(BIN)/pytest -m aot tests/kernels

# The oldest and the newest that pyproject.toml allows; each is unpacked beside the environment, not into it.
TRITONS ?= 3.6.0 3.9.0
build/triton-%: | $(INSTALLED)
	$(BIN)/pip install --no-deps --target $@.part 'triton==$*'
	mv $@.part $@

.PHONY: test-aot
test-aot: install $(TRITONS:%=build/triton-%) ## Compile the Triton kernels with other versions of triton too; no GPU needed
	for folder in $(TRITONS:%=build/triton-%); do \
	  echo "$$folder-$$(PYTHONPATH=$$folder $(BIN)/python -c 'import triton; print(triton.__version__)')" | grep -E '(-.*)\1$$' && \
	  PYTHONPATH=$$folder TRITON_DEFAULT_FP_FUSION=1 $(BIN)/pytest -q -m aot tests/kernels || exit 1; \
	done

aot-table: install $(WITH_TRITON) ## Compile the Triton kernels for sm_80 and sm_90 and rewrite the table in docs/performance.md
	$(BIN)/python -m benchmarks.gpu.ahead_of_time

.PHONY: test-gpu bench-gpu tune-gpu
# On a machine with a GPU, from the tree: any Python that has torch, triton, numpy and safetensors; no stubs.
test-gpu: ## Every Triton kernel against float64 on the GPU of this machine, and CUDA graphs against eager steps
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu test $(ARGS)

bench-gpu: ## Operations and whole steps of a Llama-3.1-8B shape against their floors, one JSON line a row; needs a GPU
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu bench $(ARGS)

tune-gpu: ## Try tiles on the GPU of this machine and write the best into kernels/gpu/tiles.json
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu tune $(ARGS)

test-memory: install stubs ## A hundred thousand random calls on the memory manager, and each of its mutants
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow tests/gpu_worker/memory $(ARGS)

test-slow: install stubs ## Run the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'slow and not gpu' --ignore=tests/gpu_worker/memory $(ARGS)

test-clients: install stubs tools $(NODE_EXAMPLE) ## Ask a running fleet from Node and through buf curl (needs npm)
	$(BIN)/python -m examples.other_clients $(BUF)

$(NODE_EXAMPLE): examples/node/package.json
	npm install --prefix examples/node --no-package-lock --no-audit --no-fund
	touch $@

test-rules: install ## Check the alert rules and that each fires and resolves (needs promtool and amtool)
	$(BIN)/pytest -m deploy tests/rules $(ARGS)

test-dashboards: install stubs $(CHART) ## Ask a real Prometheus for every panel of a fleet under traffic (needs prometheus)
	.venv-chart/bin/python -m pytest -m deploy tests/dashboards $(ARGS)

images: ## Build loraplex/control and loraplex/worker (needs docker); TORCH_INDEX is the index of torch's CPU build
	docker build -f deploy/docker/Dockerfile --target control -t loraplex/control:0.1.0 .
	docker build -f deploy/docker/Dockerfile --target worker -t loraplex/worker:0.1.0 --build-arg TORCH_INDEX='$(TORCH_INDEX)' .

test-chart: install stubs $(CHART) $(CHECKOV) ## Render the Helm chart six ways, check it, and run what it would run (needs redis-server)
	OMP_NUM_THREADS=1 .venv-chart/bin/python -m pytest -m deploy tests/chart $(ARGS)

$(CHECKOV):
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/pip install checkov==3.3.30

$(CHART): deploy/requirements.txt deploy/layer.py | $(INSTALLED)
	$(PYTHON) -m venv .venv-chart
	.venv-chart/bin/python deploy/layer.py .venv
	.venv-chart/bin/pip install -c constraints.txt -r deploy/requirements.txt
	touch $@

fuzz: install stubs ## Fuzz the store's two parsers for ten minutes each
	$(BIN)/python -m tests.fuzz --seconds 600

bench: install stubs ## A scrape after 5,000 adapters, then workload W with our engine, our fleet and PEFT in turn (half an hour); ARGS='--help' explains
	$(BIN)/python -m benchmarks.scrape
	$(BIN)/python -m benchmarks.serving $(or $(ARGS),--workloads n8,n64,distinct,one,solo)

bench-full: install stubs ## The same with 1 and 256 adapters and PEFT's other modes (hours)
	$(BIN)/python -m benchmarks.serving --workloads n1,n8,n64,n256 --systems engine,peft,peft-grouped,peft-alone $(ARGS)

bench-ablations: install stubs ## Our engine beside baselines with one part replaced, in pools of fixed bytes
	$(BIN)/python -m benchmarks.serving --workloads n64 --systems engine,eager,padded-bmm,divided,slots --pools 1.0,0.5,0.25 $(ARGS)
	$(BIN)/python -m benchmarks.serving --workloads n5 --systems engine,merge --pools 1.0 $(ARGS)

bench-peers: install stubs ## vLLM and llama.cpp, each in an environment of its own under build/peers (minutes to install)
	benchmarks/peers/install.sh
	$(BIN)/python -m benchmarks.serving --workloads n8,n64 --systems engine,llama-cpp,vllm,vllm-lora-off,peft $(ARGS)

bench-report: install ## Write the tables and plots of docs/performance.md from the last rows
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.serving.report

bench-scheduler: install stubs ## Measure the scheduler's decisions with 64 simulated workers, one JSON line a row
	$(BIN)/python -m benchmarks.scheduler --plot docs/images/scheduler-growth.svg

bench-fairness: install stubs ## What a tenant that floods two workers costs a quiet one, on the real services (4 minutes)
	$(BIN)/python -m benchmarks.fairness $(ARGS)

bench-scrape: install stubs ## The part of `make bench` about /metrics when 5,000 adapters were served (two minutes); ARGS='--adapters 100'
	$(BIN)/python -m benchmarks.scrape $(ARGS)

bench-store: install stubs ## Measure the adapter store, one JSON line last; ARGS='--part transfer' measures a part
	$(BIN)/python -m benchmarks.store $(ARGS)

bench-memory: install stubs ## Load tiers, prefetch, eviction and pool shares, one JSON line a row; ARGS='--part wait' runs one (20 minutes)
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.memory --plot $(ARGS)
bench-kernels: install ## Time every kernel against its floor, one JSON line a row; refuses when its tests are red
	$(BIN)/python -m benchmarks.kernels $(ARGS)

tools: $(BUF) ## Install buf into ./tools (needs npm)

$(BUF):
	npm install --prefix tools/buf-$(BUF_VERSION) --no-save --no-package-lock --no-audit --no-fund @bufbuild/buf@$(BUF_VERSION)

release-protos: tools ## Make today's protos the released set that `buf breaking` guards
	cd protos && ../$(BUF) build --exclude-source-info -o $(BASELINE)

clean: ## Remove stubs, build output and caches; keeps .venv and tools
	rm -rf build dist *.egg-info kernels/cpu/*.so loraplex/v1/*_pb2* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -not -path './tools/*' -prune -exec rm -rf {} +
