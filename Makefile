# Every target builds what it needs; `make setup` is safe to repeat.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
CYCLES ?= 300

BIN := .venv/bin
STAMP := .venv/.esper-setup
BUILD_REQUIRES := 'setuptools>=77' wheel 'pybind11>=2.13' ninja 'grpcio-tools>=1.85,<2' 'mypy-protobuf>=5'
# Spinning OpenMP workers of several processes on few cores slow each other down a hundredfold.
QUIET_THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

.PHONY: arenas chaos chaos-train setup protos native demo test sanitize lint typecheck bench grid targets clean

setup: $(STAMP) native

# torch is installed first and by itself, so that the chosen build (CPU or CUDA) is the one that the
# extension is compiled against and the one that later dependency resolution leaves alone.
$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' numpy $(BUILD_REQUIRES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

protos: $(STAMP)
	$(BIN)/python setup.py --quiet build_protos

native: $(STAMP) protos
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: setup
	$(BIN)/esper demo --out runs/demo

test: setup
	$(QUIET_THREADS) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

# The kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set that the
# machine has: the package as it is, with another native core. Leaks are Python's and torch's own.
SANITIZED := build/sanitize/lib
KERNEL_TESTS := test_ops.py test_ops_containment.py test_ops_large.py test_ops_layouts.py test_ops_telemetry.py test_families.py \
  test_growth.py test_program.py test_sampled_rows.py test_seed_bank.py test_telemetry.py
sanitize: setup
	ESPER_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED)
	for entry in esper/*; do case $$entry in *.so) ;; *) ln -sfn "$(CURDIR)/$$entry" $(SANITIZED)/esper/;; esac; done
	ln -sfn "$(CURDIR)/services" $(SANITIZED)/esper/services
	for isa in portable avx2 avx512; do \
	  case $$isa in portable) ;; *) grep -q "$$isa" /proc/cpuinfo || continue;; esac; \
	  (cd $(SANITIZED) && $(QUIET_THREADS) ESPER_CPU_CAPABILITY=$$isa ESPER_SANITIZE=1 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(CURDIR)/$(BIN)/python -m pytest -q -p no:xdist -p no:cacheprovider --timeout 600 -c $(CURDIR)/pyproject.toml \
	    --rootdir $(CURDIR) -k "not repeat" $(KERNEL_TESTS:%=$(CURDIR)/tests/kasmina/%) $(CURDIR)/tests/csrc) || exit 1; \
	done

# Kills a server under load and compares; a failure prints the folder with its store and log.
chaos: setup
	PYTHONPATH=tests $(BIN)/python -m chaos --cycles $(CYCLES)

lint: setup typecheck
	$(BIN)/black --check --quiet . || { $(BIN)/black --check .; exit 1; }
	$(BIN)/ruff check .
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

# mypy sees the packages as they are installed: `services/` is `esper.services`.
typecheck: setup
	rm -rf build/typecheck
	mkdir -p build/typecheck/esper
	for entry in esper/*; do ln -s "$(CURDIR)/$$entry" build/typecheck/esper/; done
	ln -s "$(CURDIR)/services" build/typecheck/esper/services
	cd build/typecheck && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p esper

# A hundred times kill -9 of trainer, plane or both: every run must end as if nothing had happened.
chaos-train: setup
	$(QUIET_THREADS) $(BIN)/python benchmarks/chaos/run.py --kills 100 --epochs 16 --kills-per-run 12

# Kasmina's whole grid, at most 20 minutes on two idle cores; stopped, it goes on where it was. MINUTES=5 ends it
# earlier. The tables and drawings are of all that was measured so far.
GRID := runs/kasmina-grid
grid: setup
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kasmina.grid --minutes $(or $(MINUTES),20) --out $(GRID).jsonl \
	  --json $(GRID).json --page $(GRID).md --map $(GRID)-map.svg --growth $(GRID)-growth.svg

bench: grid
	$(BIN)/python -m pytest benchmarks -q -p no:xdist --benchmark-only --benchmark-json=runs/benchmarks.json

# Kasmina's targets beside what this machine shows.
targets: setup
	$(BIN)/python -m benchmarks.kasmina.targets

# All growth arenas against their controls; hours on two cores. QUICK=1 runs 2 seeds of each,
# ARENAS="width depth" runs only some.
arenas: setup
	$(QUIET_THREADS) $(BIN)/python -m benchmarks.growth $(ARENAS) $(if $(QUICK),--quick,--ablate)

clean:
	rm -rf build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf esper/*/v1
	rm -f esper/*.so
	find esper services tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
