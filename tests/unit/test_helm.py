"""Renders the chart of examples/helm with helm's own engine, and checks the manifests against their schemas."""

from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.nginx.resource import NODE_VARIABLE
from otel_nginx_ebpf.settings import sources

_CHART = Path(__file__).parents[2] / "examples" / "helm" / "otel-nginx-ebpf"
_NODE = Path(__file__).parents[2] / "examples" / "collector" / "kubernetes-node.yaml"
_PROMETHEUS = {
    "metrics": {"prometheus": True, "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}
}

# A chart of someone's nginx, which takes the sidecar from ours.
_CHART_OF_AN_NGINX = """
apiVersion: v2
name: edge
version: 1.0.0
dependencies: [{ name: otel-nginx-ebpf, version: "*" }]
"""
_VALUES_OF_AN_NGINX = """
otel-nginx-ebpf:
  daemonset: { enabled: false }
  endpoint: http://gateway:4317
  settings: { OTEL_SERVICE_NAME: edge }
"""
_POD_OF_AN_NGINX = """
apiVersion: v1
kind: Pod
metadata: { name: edge }
spec:
  shareProcessNamespace: true
  containers:
    - { name: nginx, image: "nginx:1.26" }
    {{- include "otel-nginx-ebpf.sidecar" (index .Subcharts "otel-nginx-ebpf") | nindent 4 }}
"""


def _rendered(chart: Path = _CHART, values: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Return the manifests by kind. All but the operator's ServiceMonitor are of Kubernetes' schemas."""
    with helm_python.Chart.load(chart) as loaded:
        texts = loaded.render(values, name="traced").values()
    manifests = {each["kind"]: each for text in texts for each in yaml.safe_load_all(text) if each}
    for kind, manifest in manifests.items():
        for version in ("1.30", kubernetes_validate.latest_version()):
            if kind != "ServiceMonitor":
                kubernetes_validate.validate(manifest, version, strict=True)
    return manifests


def _environment(container: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


def test_helm_finds_no_fault() -> None:
    report = helm_python.lint(_CHART, _PROMETHEUS, strict=True)
    assert [each for each in report["messages"] if "icon is recommended" not in each["error"]] == []
    assert report["errors"] == []


def test_the_version_is_the_program_s() -> None:
    chart = yaml.safe_load((_CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_the_daemonset_is_that_of_the_example() -> None:
    manifests = _rendered()
    assert list(manifests) == ["DaemonSet"]
    pod = manifests["DaemonSet"]["spec"]["template"]["spec"]
    example = yaml.safe_load(_NODE.read_text())["spec"]["template"]["spec"]
    (container,), (expected,) = pod["containers"], example["containers"]
    assert container.pop("image") == f"{expected.pop('image')}:{__version__}"
    assert _environment(container) == _environment(expected)
    assert container["securityContext"] == expected["securityContext"]
    assert container["resources"] == expected["resources"]
    assert {key: pod[key] for key in example if key != "containers"} == {
        key: example[key] for key in example if key != "containers"
    }


def test_prometheus_finds_the_metrics() -> None:
    manifests = _rendered(values=_PROMETHEUS)
    daemonset, service, monitor = manifests["DaemonSet"], manifests["Service"], manifests["ServiceMonitor"]
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    (port,) = service["spec"]["ports"]
    assert container["ports"] == [{"name": "metrics", "containerPort": port["port"]}]
    assert _environment(container)["OTEL_NGINX_EBPF_METRICS_LISTEN"] == f"0.0.0.0:{port['port']}"
    assert service["spec"]["selector"] == daemonset["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert [each["port"] for each in monitor["spec"]["endpoints"]] == [port["name"]]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_the_sidecar_in_a_pod_of_another_chart(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / _CHART.name).symlink_to(_CHART)
    (tmp_path / "Chart.yaml").write_text(_CHART_OF_AN_NGINX)
    (tmp_path / "values.yaml").write_text(_VALUES_OF_AN_NGINX)
    (tmp_path / "templates" / "pod.yaml").write_text(_POD_OF_AN_NGINX)
    manifests = _rendered(tmp_path)
    assert list(manifests) == ["Pod"]
    nginx, sidecar = manifests["Pod"]["spec"]["containers"]
    assert (nginx["name"], sidecar["name"]) == ("nginx", "otel-nginx-ebpf")
    assert sidecar["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["BPF", "PERFMON", "SYS_PTRACE"]}
    told = _environment(sidecar)
    assert (told["OTEL_EXPORTER_OTLP_ENDPOINT"], told["OTEL_SERVICE_NAME"]) == ("http://gateway:4317", "edge")
    assert told[NODE_VARIABLE] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    assert told["OTEL_RESOURCE_ATTRIBUTES"] == "k8s.pod.name=$(POD_NAME),k8s.namespace.name=$(POD_NAMESPACE)"


def test_variables_of_the_chart_are_settings() -> None:
    (container,) = _rendered(values=_PROMETHEUS)["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    known = {name for field in sources.SettingsSource.model_fields for name in sources.variables(field)}
    assert {name for name in _environment(container) if name.startswith("OTEL_NGINX_EBPF")} <= known


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"endpoint": "collector:4317"}, "/endpoint"),
        ({"metrics": {"serviceMonitor": {"enabled": True}}}, "/metrics/prometheus"),
        ({"setings": {}}, "setings"),
        ({"settings": {"service_name": "edge"}}, "service_name"),
        ({"capabilities": ["BPF"]}, "/capabilities"),
    ],
)
def test_the_schema_refuses(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmValuesError, match=said):
        _rendered(values=values)
