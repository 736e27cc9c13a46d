# Runs on Debian 12 or 13, as root. Needs only make, /usr/bin/python3 and apt. Sets up the rest by itself, once.

PYTHON ?= /usr/bin/python3
BIN := .venv/bin
# Debian packages: what the program needs; what `make demo` needs, too; then tests, the image and measurements.
PACKAGES_program := python3-bpfcc python3-venv
PACKAGES_demo := $(PACKAGES_program) nginx
# To build and run the image.
PACKAGES_image := buildah ca-certificates debootstrap netavark podman runc
PACKAGES_test := $(PACKAGES_demo) $(PACKAGES_image) bpftool iproute2 openssl
# Load generators; servers of other protocols; uwsgi's Python plugin, which brings the libpython that rotel needs.
PACKAGES_test += apache2-utils fcgiwrap libnginx-mod-mail libnginx-mod-stream memcached nghttp2-client uwsgi-core uwsgi-plugin-python3
# nginx modules that handle requests, choose peers and change responses.
PACKAGES_test += libnginx-mod-http-echo libnginx-mod-http-headers-more-filter libnginx-mod-http-lua libnginx-mod-http-perl
PACKAGES_test += libnginx-mod-http-subs-filter libnginx-mod-http-upstream-fair libnginx-mod-nchan
# nginx's sources and a compiler, for tests that compare our struct layouts with the compiler's.
PACKAGES_test += binutils dwz gcc libc6-dev libpcre2-dev libssl-dev nginx-dev zlib1g-dev
# A compiler for arm64, for tests of what differs there.
PACKAGES_test += gcc-aarch64-linux-gnu libc6-dev-arm64-cross
# A terminal, its shells and a browser. Tests read their screens.
PACKAGES_test += chromium fonts-dejavu-core tmux zsh
PACKAGES_bench := $(PACKAGES_test) valgrind

.DEFAULT_GOAL := help
# Behind the collector in tests: tests/fleet/build.
ENGINES := prometheus promtool victoria-logs vlagent
BENCH ?= all
SECONDS ?= 60
MINUTES ?= 5
REQUESTS ?= 100000
ARCH ?= amd64
EMULATOR_amd64 := qemu-system-x86
EMULATOR_arm64 := qemu-system-arm
SUITE ?= bookworm
SUITES ?= bookworm trixie
RUN ?= make demo "&&" make test

.PHONY: help setup setup-test setup-bench demo test image deb debian matrix truth soak attach socket fleet vm bench counts fuzz check docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .cache/packages-program .venv/program ## install BCC from Debian, and this program to .venv/bin/otel-nginx-ebpf

setup-test: .cache/packages-test .venv/test ## install what tests need, too

setup-bench: .cache/packages-bench .venv/bench ## install what measurements need, too

demo: .cache/packages-demo .venv/program ## trace a private nginx and show its requests as waterfalls
	@$(BIN)/python examples/demo.py

test: setup-test ## run all tests, on the real kernel, a real nginx and real collectors
	tests/collector/build
	image/build
	tests/jaeger/build
	set -e; for engine in $(ENGINES); do tests/fleet/build $$engine; done
	$(BIN)/pytest

image: .cache/packages-image ## build the sidecar's image with buildah, and print the storage options for podman
	image/build

deb: .cache/packages-image ## build the Debian package into dist/, for Debian 12; SUITE=trixie for 13
	image/build deb $(SUITE)

debian: .cache/packages-image ## run README's two commands in a new Debian 12 and 13 each; SUITES="sid" RUN="make demo"
	@for suite in $(SUITES); do tests/debian/run $$suite $(RUN) || exit; done

matrix: setup-test ## run the end-to-end scenarios against a dozen builds of nginx, as a table; BUILDS="debian-11 o3" for some
	@.ci/install-packages musl-tools
	@PYTHONPATH=tests $(BIN)/python -m matrix.run $(BUILDS)

truth: setup-test ## trace random configurations and clients, and compare with nginx's log, clients and upstreams; MINUTES=5 SEED=17
	@PYTHONPATH=tests $(BIN)/python -m truth.run --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(TRUTH)

bench: setup-bench ## measure what tracing costs, as tables and in bench.json; BENCH=--help shows parts and options
	@PYTHONPATH=tests $(BIN)/python -m bench $(BENCH)

counts: BENCH := counts
counts: bench ## count instructions only: they do not depend on the machine's load

soak: setup-test ## check memory and losses in ten minutes at 5,000 requests/s without a collector; SOAK="--minutes 60"
	@PYTHONPATH=tests $(BIN)/python -m soak.run $(SOAK)

attach: setup-test ## attach to a busy nginx, twenty times each: under traffic, during reloads, on a busy machine; ten minutes
	@OTEL_NGINX_EBPF_TEST_ATTACHES=20 $(BIN)/pytest tests/e2e/test_attach_under_traffic.py

socket: setup-test ## check --propagate on the socket with REQUESTS=100000 mixed requests; five minutes
	@SOCKET_REQUESTS=$(REQUESTS) $(BIN)/pytest -s tests/e2e/test_socket_propagation.py

fleet: setup-test ## trace 20 nginx into Kafka, samplers, Jaeger, Prometheus and VictoriaLogs, with faults; FLEET="--requests 10000"
	@tests/collector/build && tests/jaeger/build
	@set -e; for engine in kafka $(ENGINES); do tests/fleet/build $$engine; done
	@PYTHONPATH=tests $(BIN)/python -m fleet.run $(FLEET)

vm: setup-test ## run scenarios and --propagate under other kernels, in qemu; KERNEL=5.10, 6.1, 6.12 or newest; ARCH=arm64 VM=--brief
	@.ci/install-packages busybox-static e2fsprogs $(EMULATOR_$(ARCH))
	@PYTHONPATH=tests $(BIN)/python -m vm.table --arch $(ARCH) $(KERNEL) $(VM)

fuzz: setup-test ## give hostile input to each reader for SECONDS=60; TARGETS="record capture" for some readers
	@PYTHONPATH=tests:. $(BIN)/python -m fuzz --seconds $(SECONDS) $(TARGETS)

check: setup-test ## check format, lint, types, layers, unit tests and docs; needs no root after setup-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest tests/unit
	@$(MAKE) --no-print-directory docs

docs: .venv/test ## build the pages of docs/ as a site in .cache/site; a broken link is an error
	@# Not --quiet: mkdocs counts only warnings that it prints.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the virtual environment and everything built
	rm -rf .venv .cache build dist *.egg-info

.venv/%: pyproject.toml | .cache/packages-program
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)'
	@touch .venv/program $@

.venv/test: EXTRAS := [test]
.venv/bench: EXTRAS := [test,bench]

# The program reads requests as nobody. A checkout that nobody cannot read is refused before anything is installed.
.cache/packages-%: .ci/install-packages Makefile
	@[ "$$(id -u)" != 0 ] || setpriv --reuid=nobody --regid=nogroup --clear-groups test -r $(CURDIR)/Makefile || [ $$? != 1 ] || { \
	    echo "setup: the user nobody, who reads requests, cannot read $(CURDIR): move it below /opt, or chmod -R go+rX it" \
	        "and chmod o+x the directories above it" >&2; exit 1; }
	@.ci/install-packages $(PACKAGES_$*)
	@mkdir -p $(@D) && touch $@
