# A machine with systemd, nginx and the program. The program is at the path that examples/systemd names.
FROM localhost/otel-nginx-ebpf
RUN apt-get update && apt-get install -y --no-install-recommends nginx systemd && rm -rf /var/lib/apt/lists/*
HEALTHCHECK NONE
ENTRYPOINT []
CMD ["/lib/systemd/systemd"]
