# Each target sets up what it needs in .venv and target/. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY := .venv/bin/python
CORE := $(shell find rust -name '*.rs' -o -name Cargo.toml) Cargo.toml $(wildcard Cargo.lock)
NEXTEST := $(shell cargo nextest --version >/dev/null 2>&1 && echo yes)
# Model checkers bring atomics of their own, so that each needs a build of its own.
MODEL := CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
	CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true cargo test --release --target-dir target
LOOM := RUSTFLAGS="--cfg tickbus_loom" $(MODEL)/loom
# One after another: what one defines of names is in the segments of all.
CRASH := $(MODEL)/crash --lib -- store delivery --nocapture --test-threads=1
SHUTTLE := RUSTFLAGS="--cfg tickbus_shuttle" $(MODEL)/shuttle --test shuttle
# What `make test` tries on the log: power cuts, flipped bits, every call that can fail, and histories
# of delivery.
CRASHES := CRASH_STATES=1000000 FLIPS=100000 FAULT_STEP=1 DELIVERY_HISTORIES=100000
# pyo3-asyncio knows CPython up to 3.12.
FUTURES = pyo3-async-runtimes $(shell $(PY) -c 'import sys; print("pyo3-asyncio" * (sys.version_info < (3, 13)))')
EXTRAS := cli,events,numpy,anyio,prometheus
export PYO3_PYTHON := $(CURDIR)/.venv/bin/python
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: help demo test check wheel test-pythons bench bench-pythons bench-decision bench-setup \
	bench-python bench-store loom shuttle crash fuzz soak sanitize coverage clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: .venv/core.stamp ## replay a synthetic market, or INPUT=file, to asyncio subscribers, over BACKEND=ring
	$(PY) -m tickbus replay $(if $(INPUT),'$(INPUT)') $(if $(BACKEND),--backend $(BACKEND) --compare) $(ARGS)

test: .venv/core.stamp ## run all tests, Rust and Python
ifeq ($(NEXTEST),yes)
	cargo nextest run
else
	cargo test --lib --tests
endif
	cargo test --doc
	$(LOOM) --test loom
	$(LOOM) --lib models
	$(SHUTTLE)
	$(CRASHES) $(CRASH)
	tools/promtool.sh
	$(PY) -m pytest

check: .venv/core.stamp ## check formats, lints, types, docs, the crate and the order of modules
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features tickbus-python/native-producer -- -D warnings
	cargo clippy --no-default-features --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps
	cargo package --quiet --allow-dirty -p tickbus
	for each in tests/fuzz benches/peers/store; do cargo metadata --quiet --locked \
		--format-version 1 --manifest-path $$each/Cargo.toml >/dev/null || exit; done
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m mypy.stubtest tickbus._core --mypy-config-file pyproject.toml
	$(PY) tools/check_module_order.py

wheel: .venv/dev.stamp ## build the sdist, and from it a manylinux2014 wheel, and test it
	$(PY) -m pip install --quiet --group wheel
	rm -rf dist target/sdist
	.venv/bin/maturin sdist --out dist
	mkdir -p target/sdist
	tar -xzmf dist/*.tar.gz -C target/sdist --strip-components 1
	cd target/sdist && PATH="$(CURDIR)/.venv/bin:$$PATH" maturin build --quiet --profile wheel \
		--zig --compatibility manylinux2014 --interpreter $(PYO3_PYTHON) \
		--target-dir $(CURDIR)/target/wheel --out $(CURDIR)/dist
	TICKBUS_WHEEL="$$(echo $(CURDIR)/dist/*.whl)" $(PY) -m pytest tests/python/test_wheel.py
	ls -l dist

test-pythons: .venv/dev.stamp ## run the Python tests on CPython 3.11 to 3.15, or on PYTHONS="3.12 3.14"
	$(PY) tools/pythons.py test $(PYTHONS) $(if $(ARGS),-- $(ARGS))

bench-pythons: .venv/dev.stamp ## measure ready reading on CPython 3.11 to 3.15, or on PYTHONS
	$(PY) tools/pythons.py bench $(PYTHONS) $(if $(ARGS),-- $(ARGS))

bench: bench-setup ## measure the targets of benches/README.md; exit 1 on a miss
	rm -rf target/criterion
	cargo bench --bench publish --bench conflate
	$(PY) benches/rust_table.py
	missed=0; \
	cargo bench --bench targets || missed=1; \
	$(PY) benches/run.py || missed=1; \
	$(PY) benches/promises.py || missed=1; \
	exit $$missed

bench-decision: bench-setup ## compare future_into_py with the awaitable of tickbus: losses, costs
	for way in $(FUTURES); do cargo build --release --target-dir target/future_into_py/$$way \
		--manifest-path benches/future_into_py/$$way/Cargo.toml || exit; done
	$(PY) -m pytest -rP benches/future_into_py
	$(PY) benches/future_into_py/measure.py

STORE_BENCH := --manifest-path benches/peers/store/Cargo.toml --target-dir target/bench-store
bench-store: bench-python ## measure the event log against raw system calls and databases; exit 1 on a miss
	benches/peers/store/setup.sh
	cargo run --quiet --release $(STORE_BENCH) -- $(ARGS)

bench-setup: bench-python
	benches/peers/lmax/run.sh --setup

bench-python: .venv/dev.stamp
	$(PY) -m pip install --quiet --group bench
	rm -f .venv/core.stamp
	.venv/bin/maturin develop --quiet --profile wheel --features native-producer --extras $(EXTRAS)

loom: ## model-check parking, waking, joining, leaving, and the ring
	$(LOOM) --test loom
	$(LOOM) --lib models

shuttle: ## play the whole bus over schedules that shuttle draws, or SCENE=name alone
	$(SHUTTLE) -- $(SCENE)

crash: ## cut the power of the event log in 10^6 ways, flip 10^5 bits, fail every call, play 10^5 histories of delivery, find each seeded fault
	$(CRASHES) $(CRASH)

# libFuzzer without cargo-fuzz: the compiler counts which edges were taken. No single allocation may be
# much larger than the buffer that a frame is read into. What a process keeps of names is no leak, and
# what is not asked for here would be most of the time: stacks of allocations, frames on the heap,
# weights of rare edges.
FUZZ_SECONDS := 60
FUZZ_FLAGS := --cfg tickbus_fuzz -Zsanitizer=address -Cpasses=sancov-module \
	-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
	-Cllvm-args=-sanitizer-coverage-pc-table
FUZZ_ASAN := malloc_context_size=1:detect_stack_use_after_return=0:quarantine_size_mb=8
fuzz: ## give the log files that a fuzzer makes of real ones, for FUZZ_SECONDS=60 (nightly and a C++ compiler)
	mkdir -p target/fuzz/corpus target/fuzz/seeds
	SEEDS=target/fuzz/seeds ASAN_OPTIONS=$(FUZZ_ASAN) RUSTFLAGS="$(FUZZ_FLAGS)" \
		cargo +nightly run --quiet --release --locked --manifest-path tests/fuzz/Cargo.toml \
		--target-dir target/fuzz --target $(shell rustc -vV | sed -n 's/^host: //p') -- \
		target/fuzz/corpus target/fuzz/seeds -max_total_time=$(FUZZ_SECONDS) \
		-max_len=4096 -malloc_limit_mb=4 -rss_limit_mb=4096 -timeout=10 -detect_leaks=0 -entropic=0 \
		-reduce_inputs=0 -artifact_prefix=target/fuzz/ -print_final_stats=1

SCHEDULES := 1000000
SOAK_MINUTES := 10
soak: .venv/core.stamp ## play SCHEDULES=10^6; 10^8 crash states of the log; 10^4 kills of its writer and of a risk consumer; disks that are full, read-only and broken; rings, then everything at once, for SOAK_MINUTES=10 each; 1,000 interpreters; 10^8 events
	SCHEDULES=$(SCHEDULES) $(SHUTTLE) -- so_many --nocapture
	CRASH_STATES=100000000 FLIPS=1000000 FAULT_STEP=1 DELIVERY_HISTORIES=10000000 $(CRASH)
	KILLS=10000 cargo test --release --test kills -- --nocapture
	SOAK_MINUTES=$(SOAK_MINUTES) cargo test --release --test ring for_minutes -- --nocapture
	$(PY) tests/soak_disks.py
	$(PY) tests/soak_risk.py 10000 $$((2 * $(SOAK_MINUTES))) $(SEED) # 13 minutes on two cores
	$(PY) tests/soak.py $(SOAK_MINUTES) $(SEED)

# The standard library is built along, so that the sanitizers see into it and nothing has to be
# suppressed; ThreadSanitizer sees no fences, so those of the core are replaced. What finds each fault
# that is put into the log runs without it, too; to find all of them takes an hour here.
SANITIZE := PROPTEST_CASES=64 cargo +nightly test -Zbuild-std --lib --tests \
	--target $(shell rustc -vV | sed -n 's/^host: //p') --target-dir target/sanitize
sanitize: ## run the Rust tests under AddressSanitizer and ThreadSanitizer (nightly with rust-src)
	RUSTFLAGS="-Zsanitizer=address" $(SANITIZE)/address -- --skip mutants
	RUSTFLAGS="-Zsanitizer=thread --cfg tickbus_tsan" $(SANITIZE)/thread -- --skip mutants

# Lines of Rust are seen by way of debug information, which has none for some heads of `match` and
# some parts of messages: hence 95 %, where each line of Python that can run has to.
TARPAULIN := $(shell cargo tarpaulin --version >/dev/null 2>&1 || echo target/tools/bin/cargo-tarpaulin)
coverage: .venv/core.stamp $(TARPAULIN) ## measure which lines the tests run; exit 1 under 100 % of Python, 95 % of Rust
	$(PY) -m pip install --quiet --group coverage
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report
	PATH="$(CURDIR)/target/tools/bin:$$PATH" cargo tarpaulin --engine ptrace --skip-clean \
		--target-dir target/coverage --packages tickbus --lib --tests --include-files 'rust/core/*' \
		--fail-under 95

target/tools/bin/cargo-tarpaulin:
	cargo install --quiet --root target/tools cargo-tarpaulin@0.37.5

clean: ## remove everything that the targets made
	rm -rf .venv target dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f python/tickbus/_core*.so

.venv/dev.stamp: pyproject.toml tools/setup.sh
	tools/setup.sh
	touch $@

.venv/core.stamp: .venv/dev.stamp $(CORE)
	.venv/bin/maturin develop --release --features native-producer --extras $(EXTRAS)
	touch $@
