# The program as a sidecar's image: Debian 12, BCC's Python bindings from Debian, no compiler, no kernel headers.
#
#   docker build -t otel-nginx-ebpf .
#   docker run --rm --privileged --pid=host -v /sys/kernel/tracing:/sys/kernel/tracing otel-nginx-ebpf
FROM debian:12-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv ca-certificates
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY otel_nginx_ebpf otel_nginx_ebpf
COPY probes probes
# /usr/bin/python3, because the loader takes BCC from the distribution's packages for that interpreter.
RUN /usr/bin/python3 -m venv /opt/otel-nginx-ebpf \
    && /opt/otel-nginx-ebpf/bin/pip install --no-cache-dir . \
    && /opt/otel-nginx-ebpf/bin/pip uninstall -y pip

FROM debian:12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-bpfcc ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/otel-nginx-ebpf /opt/otel-nginx-ebpf
ENTRYPOINT ["/opt/otel-nginx-ebpf/bin/otel-nginx-ebpf"]
CMD ["run"]
