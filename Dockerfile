# Builds the program's image, for a sidecar: Debian 12 with BCC's Python bindings, without compiler, kernel headers and pip.
#
#   docker build -t otel-nginx-ebpf .
#   docker run --rm --pid=host --cap-drop=ALL --cap-add=BPF --cap-add=PERFMON --cap-add=SYS_PTRACE \
#       --security-opt seccomp=unconfined --security-opt apparmor=unconfined otel-nginx-ebpf doctor
#
# Python packages are installed by hash, from image/*.txt; the first lines of each file say how to make it.
ARG BASE=debian:12-slim

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv
WORKDIR /src
COPY image/build-requirements.txt image/requirements.txt image/
# /usr/bin/python3, because the distribution installs BCC for that interpreter.
RUN /usr/bin/python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir --require-hashes -r image/build-requirements.txt \
    && /usr/bin/python3 -m venv --without-pip /opt/otel-nginx-ebpf \
    && /build/bin/pip --python /opt/otel-nginx-ebpf/bin/python install --no-cache-dir --require-hashes -r image/requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY otel_nginx_ebpf otel_nginx_ebpf
COPY probes probes
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheel . \
    && /build/bin/pip --python /opt/otel-nginx-ebpf/bin/python install --no-deps /wheel/*.whl \
    && /build/bin/pip --python /opt/otel-nginx-ebpf/bin/python check \
    && /build/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
        --output-file /opt/otel-nginx-ebpf/sbom.cdx.json /opt/otel-nginx-ebpf/bin/python

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-bpfcc \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*
COPY --from=build /opt/otel-nginx-ebpf /opt/otel-nginx-ebpf
LABEL org.opencontainers.image.title="otel-nginx-ebpf" \
    org.opencontainers.image.description="OpenTelemetry traces of an unmodified, running nginx, by eBPF" \
    org.opencontainers.image.licenses="Apache-2.0"
# `docker stop` kills a container after 10 s by default.
ENV OTEL_NGINX_EBPF_GRACE_SECONDS=9
ENTRYPOINT ["/opt/otel-nginx-ebpf/bin/otel-nginx-ebpf"]
# A sidecar may start before its nginx.
CMD ["run", "--wait"]
# Healthy: the probes are live, or the program waits for nginx.
HEALTHCHECK --interval=10s --start-period=15s CMD ["/opt/otel-nginx-ebpf/bin/python", "-P", "-m", "otel_nginx_ebpf.process.health"]
