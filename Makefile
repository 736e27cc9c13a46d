# Debian 12 or 13, as root. Needs nothing but make, /usr/bin/python3 and apt; sets up the rest by itself, once.

PYTHON ?= /usr/bin/python3
BIN := .venv/bin
PACKAGES := nginx openssl python3-bpfcc python3-venv
# For tests only: a load generator; servers of other protocols, whose Python plugin brings the libpython that rotel needs;
# what Go needs; nginx's own sources and a compiler to hold our struct layouts against.
PACKAGES += apache2-utils fcgiwrap libnginx-mod-mail libnginx-mod-stream memcached uwsgi-core uwsgi-plugin-python3
PACKAGES += ca-certificates
# Modules that requests, peers and answers come through.
PACKAGES += libnginx-mod-http-echo libnginx-mod-http-headers-more-filter libnginx-mod-http-lua libnginx-mod-http-perl
PACKAGES += libnginx-mod-http-subs-filter libnginx-mod-http-upstream-fair libnginx-mod-nchan
# For measurements only.
PACKAGES += bpftool nghttp2-client valgrind
PACKAGES += binutils dwz gcc libc6-dev libpcre2-dev libssl-dev nginx-dev zlib1g-dev
# A terminal, its shells, and a browser whose screens tests can read.
PACKAGES += chromium fonts-dejavu-core tmux zsh
# And those that build and run the image.
PACKAGES += buildah debootstrap netavark podman runc

.DEFAULT_GOAL := help
BENCH ?= all
SECONDS ?= 60
MINUTES ?= 5

.PHONY: help setup demo test image matrix truth soak attach vm bench counts fuzz check docs clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .cache/packages .venv/installed ## install the packages below and this program to .venv/bin/otel-nginx-ebpf

demo: setup ## trace a private nginx and show its requests as waterfalls
	@$(BIN)/python examples/demo.py

test: setup ## all tests, on the real kernel, a real nginx and a real collector
	tests/collector/build
	image/build
	tests/jaeger/build
	$(BIN)/pytest

image: .cache/packages ## the sidecar's image, with buildah, into the storage that it prints for podman
	image/build

matrix: setup ## the end-to-end scenarios against a dozen builds of nginx, as one table; or against BUILDS="debian-11 o3"
	@PYTHONPATH=tests $(BIN)/python -m matrix.run $(BUILDS)

truth: setup ## random configurations and clients, each trace held against all that is known of it; MINUTES=5 SEED=17
	@PYTHONPATH=tests $(BIN)/python -m truth.run --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(TRUTH)

bench: setup ## what tracing costs, as tables and in bench.json; parts and options: BENCH=--help
	@PYTHONPATH=tests $(BIN)/python -m bench $(BENCH)

counts: BENCH := counts
counts: bench ## the part of it that does not depend on the machine's load: instructions

soak: setup ## ten minutes at 5,000 requests/s with the collector down: memory and losses; SOAK="--minutes 60"
	@PYTHONPATH=tests $(BIN)/python -m soak.run $(SOAK)

attach: setup ## attach to a busy nginx twenty times each: under traffic, during reloads, on a busy machine; ten minutes
	@OTEL_NGINX_EBPF_TEST_ATTACHES=20 $(BIN)/pytest tests/e2e/test_attach_under_traffic.py

vm: setup ## scenarios and --propagate under other kernels, in qemu: KERNEL=5.10, 6.1, 6.12 or newest; by default all
	@.ci/install-packages busybox-static e2fsprogs qemu-system-x86
	@PYTHONPATH=tests $(BIN)/python -m vm.table $(KERNEL)

fuzz: setup ## hostile input to whatever reads any, SECONDS=60 for each reader; or TARGETS="record capture"
	@PYTHONPATH=tests:. $(BIN)/python -m fuzz --seconds $(SECONDS) $(TARGETS)

check: setup ## format, lint, types, layers, unit tests and docs; needs no root once set up
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest tests/unit
	@$(MAKE) --no-print-directory docs

docs: setup ## build the pages of docs/ as a site in .cache/site; a broken link is an error
	@# Not --quiet: mkdocs counts only warnings that it prints.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## forget the virtual environment and everything built
	rm -rf .venv .cache build dist *.egg-info

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || .ci/install-packages python3-venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.cache/packages: .ci/install-packages Makefile
	@.ci/install-packages $(PACKAGES)
	@mkdir -p $(@D) && touch $@
