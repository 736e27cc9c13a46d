# Runs on Debian 12 or 13, as root. Needs only make, /usr/bin/python3 and apt. Sets up the rest by itself, once.

PYTHON ?= /usr/bin/python3
BIN := .venv/bin
PACKAGES := nginx openssl python3-bpfcc python3-venv
# For tests only: a load generator; servers of other protocols; uwsgi's Python plugin, which brings the libpython that rotel
# needs.
PACKAGES += apache2-utils fcgiwrap libnginx-mod-mail libnginx-mod-stream memcached uwsgi-core uwsgi-plugin-python3
# To build Go programs.
PACKAGES += ca-certificates
# nginx modules that handle requests, choose peers and change responses.
PACKAGES += libnginx-mod-http-echo libnginx-mod-http-headers-more-filter libnginx-mod-http-lua libnginx-mod-http-perl
PACKAGES += libnginx-mod-http-subs-filter libnginx-mod-http-upstream-fair libnginx-mod-nchan
# For measurements only.
PACKAGES += bpftool nghttp2-client valgrind
# nginx's sources and a compiler, for tests that compare our struct layouts with the compiler's.
PACKAGES += binutils dwz gcc libc6-dev libpcre2-dev libssl-dev nginx-dev zlib1g-dev
# A terminal, its shells and a browser. Tests read their screens.
PACKAGES += chromium fonts-dejavu-core tmux zsh
# To build and run the image.
PACKAGES += buildah debootstrap netavark podman runc

.DEFAULT_GOAL := help
BENCH ?= all
SECONDS ?= 60
MINUTES ?= 5
REQUESTS ?= 100000

.PHONY: help setup demo test image matrix truth soak attach socket vm bench counts fuzz check docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .cache/packages .venv/installed ## install the packages below and this program to .venv/bin/otel-nginx-ebpf

demo: setup ## trace a private nginx and show its requests as waterfalls
	@$(BIN)/python examples/demo.py

test: setup ## run all tests, on the real kernel, a real nginx and real collectors
	tests/collector/build
	image/build
	tests/jaeger/build
	$(BIN)/pytest

image: .cache/packages ## build the sidecar's image with buildah, and print the storage options for podman
	image/build

matrix: setup ## run the end-to-end scenarios against a dozen builds of nginx, as a table; BUILDS="debian-11 o3" for some
	@PYTHONPATH=tests $(BIN)/python -m matrix.run $(BUILDS)

truth: setup ## trace random configurations and clients, and compare with nginx's log, clients and upstreams; MINUTES=5 SEED=17
	@PYTHONPATH=tests $(BIN)/python -m truth.run --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(TRUTH)

bench: setup ## measure what tracing costs, as tables and in bench.json; BENCH=--help shows parts and options
	@PYTHONPATH=tests $(BIN)/python -m bench $(BENCH)

counts: BENCH := counts
counts: bench ## count instructions only: they do not depend on the machine's load

soak: setup ## check memory and losses in ten minutes at 5,000 requests/s without a collector; SOAK="--minutes 60"
	@PYTHONPATH=tests $(BIN)/python -m soak.run $(SOAK)

attach: setup ## attach to a busy nginx, twenty times each: under traffic, during reloads, on a busy machine; ten minutes
	@OTEL_NGINX_EBPF_TEST_ATTACHES=20 $(BIN)/pytest tests/e2e/test_attach_under_traffic.py

socket: setup ## check --propagate on the socket with REQUESTS=100000 mixed requests; five minutes
	@SOCKET_REQUESTS=$(REQUESTS) $(BIN)/pytest -s tests/e2e/test_socket_propagation.py

vm: setup ## run scenarios and --propagate under other kernels, in qemu; KERNEL=5.10, 6.1, 6.12 or newest; default: all
	@.ci/install-packages busybox-static e2fsprogs qemu-system-x86
	@PYTHONPATH=tests $(BIN)/python -m vm.table $(KERNEL)

fuzz: setup ## give hostile input to each reader for SECONDS=60; TARGETS="record capture" for some readers
	@PYTHONPATH=tests:. $(BIN)/python -m fuzz --seconds $(SECONDS) $(TARGETS)

check: setup ## check format, lint, types, layers, unit tests and docs; needs no root after setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest tests/unit
	@$(MAKE) --no-print-directory docs

docs: setup ## build the pages of docs/ as a site in .cache/site; a broken link is an error
	@# Not --quiet: mkdocs counts only warnings that it prints.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the virtual environment and everything built
	rm -rf .venv .cache build dist *.egg-info

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || .ci/install-packages python3-venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.cache/packages: .ci/install-packages Makefile
	@.ci/install-packages $(PACKAGES)
	@mkdir -p $(@D) && touch $@
