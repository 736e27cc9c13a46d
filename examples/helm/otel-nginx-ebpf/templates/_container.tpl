{{- define "otel-nginx-ebpf.labels" -}}
app.kubernetes.io/name: otel-nginx-ebpf
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* What the container of a node and that of a pod share. The caller adds the variables. */ -}}
{{- define "otel-nginx-ebpf.container" -}}
name: otel-nginx-ebpf
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  runAsUser: 0
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
    add: {{ toJson .Values.capabilities }}
  seccompProfile: {{ toJson .Values.seccompProfile }}
{{- if .Values.metrics.prometheus }}
ports:
  - { name: metrics, containerPort: {{ .Values.metrics.port }} }
{{- end }}
{{- /* No readiness probe: nginx also serves while it is not traced. */}}
livenessProbe:
  exec: { command: [/opt/otel-nginx-ebpf/bin/python, -P, -m, otel_nginx_ebpf.process.health] }
  initialDelaySeconds: 15
  timeoutSeconds: 5
resources: {{ toJson .Values.resources }}
env:
  - { name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ quote .Values.endpoint }} }
  - { name: OTEL_NGINX_EBPF_METRICS, value: {{ quote .Values.metrics.otlp }} }
  {{- if .Values.metrics.prometheus }}
  - { name: OTEL_NGINX_EBPF_METRICS_LISTEN, value: "0.0.0.0:{{ .Values.metrics.port }}" }
  {{- end }}
  - { name: K8S_NODE_NAME, valueFrom: { fieldRef: { fieldPath: spec.nodeName } } }
  {{- range $name, $value := .Values.settings }}
  - { name: {{ $name }}, value: {{ quote $value }} }
  {{- end }}
{{- end }}

{{- /* The list's item for a pod whose nginx it shares process ids with. */ -}}
{{- define "otel-nginx-ebpf.sidecar" -}}
- {{ include "otel-nginx-ebpf.container" . | nindent 2 | trim }}
    - { name: POD_NAME, valueFrom: { fieldRef: { fieldPath: metadata.name } } }
    - { name: POD_NAMESPACE, valueFrom: { fieldRef: { fieldPath: metadata.namespace } } }
    {{- if not (hasKey .Values.settings "OTEL_RESOURCE_ATTRIBUTES") }}
    - { name: OTEL_RESOURCE_ATTRIBUTES, value: "k8s.pod.name=$(POD_NAME),k8s.namespace.name=$(POD_NAMESPACE)" }
    {{- end }}
{{- end }}
