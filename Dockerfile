# Builds the program's image, for a sidecar: what BCC and Python need of Debian 12, without compiler, kernel headers and pip.
#
#   docker build -t otel-nginx-ebpf .
#   docker run --rm --pid=host --cap-drop=ALL --cap-add=BPF --cap-add=PERFMON --cap-add=SYS_PTRACE \
#       --security-opt seccomp=unconfined --security-opt apparmor=unconfined otel-nginx-ebpf doctor
#
# It also builds the Debian package, for the release and the machine of the base image:
#
#   docker build --build-arg BASE=debian:13-slim --target deb --output dist .
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

FROM build AS package
COPY examples/systemd examples/systemd
COPY image/make-deb image/
RUN image/make-deb /deb

FROM scratch AS deb
COPY --from=package /deb /

FROM ${BASE} AS debian
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-bpfcc \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

FROM debian AS llvm
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
COPY image/link-llvm /
RUN /link-llvm /libclang-cpp.so.14

FROM debian AS small
COPY --from=llvm /libclang-cpp.so.14 /usr/lib/llvm-14/lib/
# Nothing that runs here uses the packages that go. Their absence is in dpkg's list, for scanners.
RUN ln -sf ../llvm-14/lib/libclang-cpp.so.14 /usr/lib/*-linux-gnu/libLLVM-14.so.1 \
    && dpkg --purge --force-depends --force-remove-essential --force-remove-protected \
        apt libapt-pkg6.0 bash diffutils e2fsprogs libext2fs2 findutils libgcrypt20 libgnutls30 libp11-kit0 libunistring2 \
        libicu72 libxml2 libz3-4 login openssl passwd tar util-linux perl-base \
    && rm -rf /var/cache/* /var/log/*

FROM scratch
COPY --from=small / /
COPY --from=build /opt/otel-nginx-ebpf /opt/otel-nginx-ebpf
LABEL org.opencontainers.image.title="otel-nginx-ebpf" \
    org.opencontainers.image.description="OpenTelemetry traces of an unmodified, running nginx, by eBPF" \
    org.opencontainers.image.licenses="Apache-2.0"
# `docker stop` kills a container after 10 s by default.
ENV OTEL_NGINX_EBPF_GRACE_SECONDS=9 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ENTRYPOINT ["/opt/otel-nginx-ebpf/bin/otel-nginx-ebpf"]
# A sidecar may start before its nginx.
CMD ["run", "--wait"]
# Healthy: the probes are live, or the program waits for nginx.
HEALTHCHECK --interval=10s --start-period=15s CMD ["/opt/otel-nginx-ebpf/bin/python", "-P", "-m", "otel_nginx_ebpf.process.health"]
