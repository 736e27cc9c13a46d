# A machine: systemd, nginx and, at the place that examples/systemd names, the program.
FROM localhost/otel-nginx-ebpf
RUN apt-get update && apt-get install -y --no-install-recommends nginx systemd && rm -rf /var/lib/apt/lists/*
HEALTHCHECK NONE
ENTRYPOINT []
CMD ["/lib/systemd/systemd"]
