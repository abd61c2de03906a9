# Everything a user, a developer and CI run. `make demo` and `make test` start from a bare
# Debian with git, make, python3 and root; what is missing is installed, once.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Processes that run tests at a time: most tests wait for a timer most of the time.
WORKERS ?= $(shell echo $$(($$(nproc) + 1)))
export PATH := $(CURDIR)/.tools/bin:$(PATH)
export PYTHONDONTWRITEBYTECODE := 1

# Tests start hundreds of daemons: without __pycache__ each would compile its sources anew.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(PY) -m pytest -q -n $(WORKERS)

PIP = $(PY) -m pip install --quiet --disable-pip-version-check
DEPENDENCIES := import tomllib; about = tomllib.load(open("pyproject.toml", "rb")); \
  print(*about["build-system"]["requires"], *about["project"]["dependencies"], sep="\n")

TABLES := tundp/choices.py tundp/engine/counters.py tundp/engine/hop_slots.py tundp/engine/taps.py $(wildcard tundp/wire/*.py)
NATIVE := setup.py $(TABLES) $(wildcard native/*.py native/*/*.h native/*/*.c)

LABS = $(shell $(PY) -m tests.thorough)

.DEFAULT_GOAL := help
.PHONY: help root build demo test lint check bench micro scale neighbours silence churn look early events skbdrops refused booted peers hostile fuzz cross rungs labs labs-mutants format clean

help:
	@echo 'make demo     two nodes with pods in network namespaces, checked end to end (root)'
	@echo 'make test     all tests (root)'
	@echo 'make lint     format, lint and types'
	@echo 'make check    format, lint, types and the tests that need no root, in two minutes'
	@echo 'make bench    the overlay against kernel VXLAN, report in tundp-bench/ (root)'
	@echo 'make micro    micro-benchmarks of single functions'
	@echo 'make scale    what 1,000 to 65,000 leases cost, and a start (root)'
	@echo 'make neighbours   what silent neighbours and a slow path cost a live peer (root)'
	@echo 'make silence   what a silent name server beside a lost etcd costs (root)'
	@echo 'make look     what one look for obstacles costs on a host with much to look at (root)'
	@echo 'make early    how long packets wait for a start with the descriptors of the one before (root)'
	@echo 'make booted   what packets lose below a systemd that restarts, kills and reloads the unit (root)'
	@echo 'make peers    what a packet costs when 1 to 1,000 peers are sent to in turn (root)'
	@echo 'make churn    what hundreds of veth pairs and 10,000 routes that change cost (root)'
	@echo 'make events   what a trace, a capture and a flood of drops cost the packet threads (root)'
	@echo 'make skbdrops what looking at the drops of the kernel costs them (root)'
	@echo 'make refused  what 20,000 refused leases and 100,000 broken keys cost (root)'
	@echo 'make hostile   everything hostile at once, for HOSTILE_SECONDS=3600 on real daemons (root)'
	@echo 'make fuzz     every parser and the engines under a fuzzer; FUZZ_SECONDS=60 for each,'
	@echo '              8 make it a minute in all'
	@echo 'make cross    the C code for arm64 and big-endian s390x, its tests under qemu'
	@echo 'make rungs    the end-to-end tests once more with each offload off, each layout (root)'
	@echo 'make labs     all tests of the debugging commands, not a third: every broken lab that tundp doctor must'
	@echo '              name and mend, every command under load, 30 of them killed; and all that make'
	@echo '              test leaves out for its time: further cases, engines and loops (root)'
	@echo 'make labs-mutants   the same with a doctor that is broken: each of them must fail (root)'
	@echo 'make build    only set up: .venv with tundp in it, the C module compiled'
	@echo 'make clean    remove what the others made'

build: $(VENV)/.built $(VENV)/.developed

root:
	@test "$$(id -u)" = 0 || { echo 'This makes network namespaces and TUN devices: run it as root.' >&2; exit 1; }

demo: root $(VENV)/.built
	@setup/apt.sh demo
	@setup/etcd.sh
	@$(PY) -m tundp demo

test: root build
	@setup/apt.sh test
	@ETCD_REQUIRED=1 setup/etcd.sh
	@setup/debian.sh
	@$(PYTEST) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: build
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m ruff check --quiet .
	@$(PY) -m mypy --no-error-summary

check: lint
	@$(PYTEST) tests/unit tests/property tests/twin

bench: root build
	@$(PY) -m tundp bench

micro: build
	@$(PY) -m bench.micro

scale: root build
	@setup/apt.sh demo
	@ETCD_REQUIRED=1 setup/etcd.sh
	@$(PY) -m bench.scale

neighbours: root build
	@setup/apt.sh demo
	@$(PY) -m bench.neighbours

silence: root build
	@setup/apt.sh demo
	@ETCD_REQUIRED=1 setup/etcd.sh
	@$(PY) -m bench.silence

churn: root build
	@setup/apt.sh demo
	@$(PY) -m bench.churn

booted: root build
	@setup/apt.sh demo
	@setup/apt.sh test
	@$(PY) -m bench.booted

peers: root build
	@setup/apt.sh demo
	@$(PY) -m bench.peers

look: root build
	@setup/apt.sh demo
	@$(PY) -m bench.look

early: root build
	@setup/apt.sh demo
	@$(PY) -m bench.early

events: root build
	@setup/apt.sh demo
	@$(PY) -m bench.events

skbdrops: root build
	@setup/apt.sh demo
	@$(PY) -m bench.skb_drops

refused: root build
	@setup/apt.sh demo
	@ETCD_REQUIRED=1 setup/etcd.sh
	@$(PY) -m bench.refused

hostile: root build
	@setup/apt.sh demo
	@ETCD_REQUIRED=1 setup/etcd.sh
	@$(PY) -m bench.hostile

fuzz:
	@setup/apt.sh fuzz
	@sh tests/native/fuzz/run.sh $(or $(FUZZ_SECONDS),60)

cross:
	@setup/apt.sh cross
	@sh tests/native/cross.sh

RUNGS := simple;gso --disable-offloads=tun-tso;gso --disable-offloads=tun-uso
RUNGS := $(RUNGS);gso --disable-offloads=udp-segment;gso --disable-offloads=udp-gro
RUNGS := $(RUNGS);gso --disable-offloads=tcp-coalesce;gso --disable-offloads=udp-coalesce
RUNGS := $(RUNGS);gso --layout=split;gso --workers=2;gso --spin=0;mmsg --layout=split

rungs: root build
	@setup/apt.sh test
	@ETCD_REQUIRED=1 setup/etcd.sh
	@TUNDP_TEST_ENGINES='$(RUNGS)' $(PYTEST) tests/netns/test_packets.py tests/netns/test_life.py

labs: root build
	@setup/apt.sh test
	@ETCD_REQUIRED=1 setup/etcd.sh
	@LABS=all LAB_KILLS=30 $(PYTEST) --dist loadfile $(LABS)

labs-mutants: root build
	@setup/apt.sh test
	@ETCD_REQUIRED=1 setup/etcd.sh
	@$(PY) -m tests.netns.labs_mutants

format: build
	@$(PY) -m ruff format --quiet .
	@$(PY) -m ruff check --quiet --fix .

clean:
	rm -rf $(VENV) .tools build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f tundp/*.so tundp/_native.c tundp/_traffic.c
	find tundp tests bench native -name __pycache__ -type d -exec rm -rf {} +

# A virtual environment with the wheels that run tundp, each at its pinned version.
$(VENV)/.wheels: setup/requirements.txt pyproject.toml setup/apt.txt setup/apt.sh
	@setup/apt.sh build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tundp needs Python 3.11 or later")'
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo 'pip: wheels of pyproject.toml, at the versions of setup/requirements.txt'
	@$(PY) -c '$(DEPENDENCIES)' | $(PIP) --use-pep517 --constraint setup/requirements.txt --requirement /dev/stdin
	@touch $@

# Those that develop, test and measure it, too.
$(VENV)/.developed: $(VENV)/.wheels
	@echo 'pip: wheels of setup/requirements.txt'
	@$(PIP) --use-pep517 --requirement setup/requirements.txt
	@touch $@

# tundp itself, editable, with its C module.
$(VENV)/.built: $(VENV)/.wheels pyproject.toml MANIFEST.in $(NATIVE)
	@echo 'build: tundp and its C module'
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@
