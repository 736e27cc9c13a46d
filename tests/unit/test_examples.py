"""Checks the manifests of examples/ against their schemas and each other.

tests/e2e/test_example.py runs the examples that can run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import promql_parser
import pytest
import yaml

from otel_nginx_ebpf.nginx.resource import NODE_VARIABLE

_COLLECTOR = Path(__file__).parents[2] / "examples" / "collector"
_COMPOSE = _COLLECTOR / "compose.yaml"
_KUBERNETES = ("kubernetes.yaml", "kubernetes-node.yaml")
_CAPABILITIES = ["BPF", "PERFMON", "SYS_PTRACE"]


def _resources(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((_COLLECTOR / name).read_text()))


def _containers(resource: dict[str, Any]) -> list[dict[str, Any]]:
    return list(resource["spec"]["template"]["spec"]["containers"])


def test_compose_file_is_of_the_specification() -> None:
    """Its parser takes no key that the specification does not have."""
    parsed = compose_spec.PyCompose.from_yaml(_COMPOSE.read_text())
    sidecar = yaml.safe_load(_COMPOSE.read_text())["services"]["otel-nginx-ebpf"]
    assert "otel-nginx-ebpf" in parsed
    assert (sidecar["pid"], sidecar["cap_drop"], sidecar["cap_add"]) == ("service:nginx", ["ALL"], _CAPABILITIES)


def test_what_compose_mounts_is_there() -> None:
    services = yaml.safe_load(_COMPOSE.read_text())["services"]
    mounted = {volume.split(":")[0] for each in services.values() for volume in each.get("volumes", ())}
    assert len(mounted) >= 9
    assert [path for path in mounted if not (_COLLECTOR / path).is_file()] == []


@pytest.mark.parametrize("name", _KUBERNETES)
@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_kubernetes_manifests_are_of_the_schemas(name: str, version: str) -> None:
    for resource in _resources(name):
        kubernetes_validate.validate(resource, version, strict=True)


def _sidecars() -> Iterator[dict[str, Any]]:
    for name in _KUBERNETES:
        for resource in _resources(name):
            if resource["kind"] in ("Deployment", "DaemonSet"):
                yield from (each for each in _containers(resource) if each["name"] == "otel-nginx-ebpf")


def test_sidecars_have_the_least_rights() -> None:
    sidecars = list(_sidecars())
    assert len(sidecars) == 2
    for each in sidecars:
        assert each["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": _CAPABILITIES}
        assert each["securityContext"]["allowPrivilegeEscalation"] is False


def test_sidecars_are_told_the_node() -> None:
    for each in _sidecars():
        told = {variable["name"]: variable for variable in each["env"]}
        assert told[NODE_VARIABLE]["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}


def test_kubernetes_configuration_is_made() -> None:
    """Each configMap that a pod mounts is made by kustomization.yaml, of files that are there."""
    maps = yaml.safe_load((_COLLECTOR / "kustomization.yaml").read_text())["configMapGenerator"]
    assert [path for each in maps for path in each["files"] if not (_COLLECTOR / path).is_file()] == []
    deployments = [each for each in _resources("kubernetes.yaml") if each["kind"] == "Deployment"]
    volumes = [volume for each in deployments for volume in each["spec"]["template"]["spec"].get("volumes", ())]
    assert {volume["configMap"]["name"] for volume in volumes} == {each["name"] for each in maps}


def test_both_name_the_same_images() -> None:
    composed = {each.get("image") for each in yaml.safe_load(_COMPOSE.read_text())["services"].values()}
    deployed = {
        container["image"]
        for each in _resources("kubernetes.yaml")
        if each["kind"] == "Deployment"
        for container in _containers(each)
    }
    assert deployed - {"otel-nginx-ebpf"} == {image for image in composed if image} | {"nginx:1.26"}


@pytest.mark.parametrize("name", ["latency", "service-graph"])
def test_dashboards_ask_in_promql(name: str) -> None:
    dashboard = json.loads((_COLLECTOR / "grafana" / f"{name}.json").read_text())
    sources = yaml.safe_load((_COLLECTOR / "grafana" / "datasources.yaml").read_text())["datasources"]
    known = {(each["type"], each["uid"]) for each in sources}
    for panel in dashboard["panels"]:
        assert (panel["datasource"]["type"], panel["datasource"]["uid"]) in known
        for target in panel["targets"]:
            if panel["datasource"]["type"] == "prometheus":
                promql_parser.parse(target["expr"].replace("$__rate_interval", "1m"))


_FLEET = _COLLECTOR.with_name("fleet")


def test_fleet_compose_file_is_of_the_specification() -> None:
    text = (_FLEET / "compose.yaml").read_text()
    assert "sampler" in compose_spec.PyCompose.from_yaml(text)
    mounted = {
        volume.split(":")[0] for each in yaml.safe_load(text)["services"].values() for volume in each.get("volumes", ())
    }
    paths = {path for path in mounted if path.startswith(".")}
    assert len(paths) >= 8
    # Of the first file's directory, as Compose does with several.
    assert [path for path in paths if not (_COLLECTOR / path).is_file()] == []


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_fleet_kubernetes_manifests_are_of_the_schemas(version: str) -> None:
    for resource in yaml.safe_load_all((_FLEET / "kubernetes.yaml").read_text()):
        kubernetes_validate.validate(resource, version, strict=True)


def test_fleet_kubernetes_overlay_finds_what_it_changes() -> None:
    overlay = yaml.safe_load((_FLEET / "kustomization.yaml").read_text())
    assert [
        path for each in overlay["configMapGenerator"] for path in each["files"] if not (_FLEET / path).is_file()
    ] == []
    base = {(each["kind"], each["metadata"]["name"]): each for each in _resources("kubernetes.yaml")}
    for each in overlay["patches"]:
        changed = base[each["target"]["kind"], each["target"]["name"]]
        patch = yaml.safe_load(each["patch"])
        if isinstance(patch, dict):
            names = {container["name"] for container in patch["spec"]["template"]["spec"]["containers"]}
            assert names - {"vlagent"} <= {container["name"] for container in _containers(changed)}
            continue
        for step in patch:
            *parents, last = step["path"].removeprefix("/").split("/")
            found: Any = changed
            for name in parents:
                found = found[int(name)] if isinstance(found, list) else found[name]
            assert last == "-" or step["op"] == "add" or found[int(last)]
