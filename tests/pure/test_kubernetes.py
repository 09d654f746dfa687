"""deploy/kubernetes: valid for Kubernetes and KEDA, true about commands, ports, paths and metrics."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from baton.health import Health, parse_address
from baton.server.guard import OPEN_PATHS
from baton.wire.keys import NAMES, is_exposed
from tests.pure.golden import UPDATING, check
from tests.pure.kustomize import Resource, build, containers
from tests.pure.test_dashboard import full
from tests.pure.test_packaging import DEPLOY, PASSED_ON

FOLDER = DEPLOY / "kubernetes"
OVERLAYS = {"autoscaled": FOLDER, "cpu": FOLDER / "overlays/cpu", "gpu": FOLDER / "overlays/gpu"}
ROLES = {"router", "prefill", "decode", "http"}
VERSIONS = ("1.29", "1.37")  # the oldest and the newest that the manifests are meant for
LAST_WORDS_S = 5  # of a process, after its own deadline
UID = 10001

KEDA_SINCE = "2.17"
"""The version of KEDA that brought the youngest field used here, `fallback.behavior`. With an older one
`kubectl apply` refuses the ScaledObjects: it checks fields strictly."""
KEDA: dict[str, Any] = {  # the fields of its two kinds that we use; its own schema is not on PyPI
    "ScaledObject": {
        "required": ["scaleTargetRef", "triggers"],
        "additionalProperties": False,
        "properties": {
            "scaleTargetRef": {
                "required": ["name"], "additionalProperties": False,
                "properties": {"name": {"type": "string"}},
            },
            "minReplicaCount": {"type": "integer", "minimum": 1},  # 0 would end the last worker
            "maxReplicaCount": {"type": "integer"},
            "pollingInterval": {"type": "integer"},
            "fallback": {
                "required": ["failureThreshold", "replicas"], "additionalProperties": False,
                "properties": {
                    "failureThreshold": {"type": "integer"}, "replicas": {"type": "integer"},
                    "behavior": {"enum": ["static", "currentReplicas", "currentReplicasIfHigher",
                                          "currentReplicasIfLower"]},
                },
            },
            "advanced": {
                "additionalProperties": False,
                "properties": {"horizontalPodAutoscalerConfig": {
                    "additionalProperties": False, "properties": {"behavior": {"type": "object"}},
                }},
            },
            "triggers": {"minItems": 1, "items": {
                "required": ["type", "metadata"], "additionalProperties": False,
                "properties": {
                    "type": {"const": "metrics-api"},
                    "name": {"type": "string"},
                    "metricType": {"enum": ["AverageValue", "Value"]},
                    "authenticationRef": {"required": ["name"], "additionalProperties": False,
                                          "properties": {"name": {"type": "string"}}},
                    "metadata": {
                        "required": ["url", "valueLocation", "targetValue"],
                        "additionalProperties": False,
                        "properties": {
                            "url": {"type": "string"}, "valueLocation": {"type": "string"},
                            "targetValue": {"type": "string", "pattern": r"^[0-9.]+$"},
                            "format": {"enum": ["json", "xml", "yaml", "prometheus"]},
                            "authMode": {"enum": ["apiKey", "basic", "tls", "bearer"]},
                        },
                    },
                },
            }},
        },
    },
    "TriggerAuthentication": {
        "required": ["secretTargetRef"], "additionalProperties": False,
        "properties": {"secretTargetRef": {"minItems": 1, "items": {
            "required": ["parameter", "name", "key"], "additionalProperties": False,
            "properties": {"parameter": {"const": "token"}, "name": {"type": "string"},
                           "key": {"type": "string"}},
        }}},
    },
}  # fmt: skip


@cache
def built(overlay: str) -> list[Resource]:
    return build(OVERLAYS[overlay])


def of_kind(overlay: str, kind: str) -> dict[str, Resource]:
    return {each["metadata"]["name"]: each for each in built(overlay) if each["kind"] == kind}


def deployments(overlay: str) -> Iterator[tuple[str, Resource, dict[str, Any]]]:
    """Role, Deployment and its container."""
    for name, each in of_kind(overlay, "Deployment").items():
        (container,) = containers(each)
        yield name.removeprefix("baton-"), each, container


def environment(overlay: str, container: dict[str, Any]) -> dict[str, str]:
    """The variables of a container, with examples for what only a cluster knows."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= of_kind(overlay, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    examples = {"status.podIP": "10.1.2.3", "metadata.name": "baton-decode-7d9f-x2x"}
    for each in container.get("env", ()):
        value = each["valueFrom"]
        if "fieldRef" in value:
            found[each["name"]] = examples[value["fieldRef"]["fieldPath"]]
        else:
            limit = value["resourceFieldRef"]["resource"]
            assert limit == "limits.cpu"
            found[each["name"]] = container["resources"]["limits"]["cpu"]
    return found


def command_line(overlay: str, container: dict[str, Any]) -> list[str]:
    """The arguments as the container gets them."""
    values = environment(overlay, container)
    return [
        re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], each) for each in container["args"]
    ]


def options(overlay: str, container: dict[str, Any]) -> dict[str, Any]:
    """The values that the real command reads from them."""
    name, *arguments = command_line(overlay, container)
    with PASSED_ON[name].make_context(name, arguments) as context:
        return dict(context.params)


EVERY = pytest.mark.parametrize("overlay", OVERLAYS)


def rendered_by_kubectl(folder: Path) -> list[Resource]:
    kubectl = shutil.which("kubectl")
    assert kubectl is not None, "kubectl records the golden file, and is not installed here"
    ran = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, check=True)
    found = yaml.safe_load_all(ran.stdout)
    return sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))


def test_the_tests_see_what_kubectl_makes_of_the_files() -> None:
    render = rendered_by_kubectl if UPDATING else build
    check("kubernetes.json", {name: render(folder) for name, folder in OVERLAYS.items()})


@pytest.mark.parametrize("overlay", ["autoscaled", "gpu"])  # the first holds all of "cpu"
def test_kubernetes_accepts_every_resource(overlay: str) -> None:
    for each in built(overlay):
        if each["apiVersion"].startswith("keda.sh/"):
            assert set(each) == {"apiVersion", "kind", "metadata", "spec"}
            jsonschema.validate(each["spec"], KEDA[each["kind"]])
        else:
            for version in VERSIONS:
                kubernetes_validate.validate(each, version, strict=True)


def test_the_validation_finds_a_wrong_type_and_an_unknown_field() -> None:
    broken: Resource = {**of_kind("cpu", "Service")["baton"]}
    for spec in ({"ports": [{"port": "80"}]}, {"ports": [{"port": 80}], "selektor": {}}):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**broken, "spec": spec}, VERSIONS[-1], strict=True)


@EVERY
def test_every_process_is_started_with_options_that_its_command_has(overlay: str) -> None:
    found = {}
    for role, _, container in deployments(overlay):
        found[role] = options(overlay, container)
        assert command_line(overlay, container)[0] == f"{role}-worker".replace(
            "router-worker", "router").replace("http-worker", "http")  # fmt: skip
    assert set(found) == ROLES
    assert len({each["model"] for each in found.values()}) == 1


@EVERY
def test_every_variable_is_used_and_there(overlay: str) -> None:
    used = set()
    for _, _, container in deployments(overlay):
        named = set(re.findall(r"\$\((\w+)\)", " ".join(container["args"])))
        values = environment(overlay, container)
        assert named <= set(values)
        assert {each["name"] for each in container.get("env", ())} <= named
        used |= named
    assert set(of_kind(overlay, "ConfigMap")["baton"]["data"]) <= used


@EVERY
def test_a_command_listens_where_the_port_says(overlay: str) -> None:
    for role, _, container in deployments(overlay):
        given = options(overlay, container)
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        if role == "http":
            assert ports == {"http": given["port"]}
            continue
        host, port = parse_address(given["health"])
        assert (host, port) == ("10.1.2.3", ports.pop("health"))
        if role == "router":
            assert given["address"] == f"tcp://{host}:{ports.pop('router')}"
        assert not ports


@EVERY
def test_a_service_leads_to_one_deployment_by_the_name_of_its_port(overlay: str) -> None:
    for service in of_kind(overlay, "Service").values():
        (target,) = [
            container
            for _, deployment, container in deployments(overlay)
            if service["spec"]["selector"].items()
            <= deployment["spec"]["template"]["metadata"]["labels"].items()
        ]
        named = {each["name"] for each in target["ports"]}
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= named


@EVERY
def test_everybody_finds_the_router_at_its_service(overlay: str) -> None:
    (port,) = of_kind(overlay, "Service")["baton-router"]["spec"]["ports"]
    for role, _, container in deployments(overlay):
        if role != "router":
            assert options(overlay, container)["router"] == f"tcp://baton-router:{port['port']}"


@EVERY
def test_keys_are_mounted_where_the_options_say_and_the_routers_secret_only_there(
    overlay: str,
) -> None:
    for role, deployment, container in deployments(overlay):
        pod = deployment["spec"]["template"]["spec"]
        volumes = {each["name"]: each for each in pod["volumes"]}
        mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
        given = options(overlay, container)
        secret = mounts[str(given["keys"])]["secret"]
        assert secret["secretName"] == "baton-keys"
        wanted = list(NAMES if role == "router" else NAMES[1:])
        assert sorted(wanted) == sorted(each["path"] for each in secret.get("items", ())) or (
            role == "router" and "items" not in secret
        )
        # A Secret belongs to root; fsGroup lets our user read it.
        assert pod["securityContext"]["fsGroup"] == UID
        assert secret["defaultMode"] & 0o040
        assert not is_exposed(secret["defaultMode"], owner=0, reader=UID)
        if role == "http":
            folder = mounts[str(given["api_key_file"].parent)]
            assert folder["secret"]["secretName"] == "baton-api-keys"
            assert given["api_key_file"].name == "api-keys"


@EVERY
def test_probes_ask_what_is_answered(overlay: str) -> None:
    health = Health(1.0)
    health.beat()
    for role, _, container in deployments(overlay):
        ports = {each["name"] for each in container["ports"]}
        for probe, path in (
            ("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz"),
        ):  # fmt: skip
            asked = container[probe]["httpGet"]
            assert asked["path"] == path
            assert asked["port"] in ports
            if role == "http":
                assert path in OPEN_PATHS
            else:
                assert health.answer(f"GET {path} HTTP/1.1\r\n".encode())[0] == 200


@EVERY
def test_a_pod_has_the_time_to_drain(overlay: str) -> None:
    for role, deployment, container in deployments(overlay):
        pod, given = deployment["spec"]["template"]["spec"], options(overlay, container)
        waits = 0
        if "lifecycle" in container:
            program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
            assert program == "sleep"
            waits = int(seconds)
        drains = given.get("drain_timeout", given.get("shutdown_s", 0))
        assert pod["terminationGracePeriodSeconds"] >= waits + drains + LAST_WORDS_S
        assert ("lifecycle" in container) == (role != "router")  # its clients resubmit


@EVERY
def test_workers_are_replaced_one_by_one_and_there_is_never_a_second_router(overlay: str) -> None:
    for role, deployment, _ in deployments(overlay):
        strategy = deployment["spec"]["strategy"]
        if role == "router":
            assert (deployment["spec"]["replicas"], strategy) == (1, {"type": "Recreate"})
        else:
            assert strategy["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


@EVERY
def test_containers_have_no_rights_they_do_not_need(overlay: str) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"USER {UID}:{UID}" in dockerfile
    for _, deployment, container in deployments(overlay):
        pod = deployment["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == UID
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        mounted = {each["mountPath"] for each in container["volumeMounts"]}
        assert mounted >= {"/var/cache/baton", "/tmp"}  # what a process writes to


@EVERY
def test_policies_and_budgets_select_deployments_that_are_there(overlay: str) -> None:
    roles = {role for role, _, _ in deployments(overlay)}
    selectors = [
        each["spec"].get("podSelector", each["spec"].get("selector"))
        for kind in ("NetworkPolicy", "PodDisruptionBudget")
        for each in of_kind(overlay, kind).values()
    ]
    found = set()
    for selector in selectors:
        for each in selector.get("matchExpressions", ()):
            if each["key"].endswith("component"):
                found |= set(each["values"])
        if "matchLabels" in selector:
            found.add(selector["matchLabels"]["app.kubernetes.io/component"])
    assert found == roles == ROLES


def test_a_cpu_worker_computes_with_as_many_threads_as_it_has_cores() -> None:
    """A container sees the cores of its node, so the router cannot hand out the right ones."""
    for role, _, container in deployments("cpu"):
        if role in ("prefill", "decode"):
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]  # for the static CPU policy
            assert options("cpu", container)["threads"] == int(resources["limits"]["cpu"])


def test_a_gpu_worker_has_a_gpu_and_an_image_for_it() -> None:
    for role, deployment, container in deployments("gpu"):
        workers = role in ("prefill", "decode")
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == workers
        assert container["image"] == "baton:cuda"
        if workers:
            assert options("gpu", container)["device"] == "auto"
            (tolerated,) = deployment["spec"]["template"]["spec"]["tolerations"]
            assert tolerated["key"] == "nvidia.com/gpu"


def test_keda_reads_metrics_that_are_there_from_the_service_as_a_client_with_a_key() -> None:
    text = full().exposition().decode()
    exposed = {line.split(" ")[0].replace('model_name="demo",', "") for line in text.splitlines()}
    services, (http,) = of_kind("autoscaled", "Service"), [
        container for role, _, container in deployments("autoscaled") if role == "http"
    ]  # fmt: skip
    for name, scaled in of_kind("autoscaled", "ScaledObject").items():
        assert scaled["spec"]["scaleTargetRef"]["name"] == name
        role = name.removeprefix("baton-")
        for trigger in scaled["spec"]["triggers"]:
            asked = trigger["metadata"]
            assert asked["valueLocation"] in exposed
            assert f'role="{role}"' in asked["valueLocation"]
            url = urlsplit(asked["url"])
            host = str(url.hostname)
            assert (url.scheme, url.port, url.path) == ("http", None, "/metrics")
            assert host in options("autoscaled", http)["allowed_hosts"]
            service, namespace, *_ = host.split(".")
            assert services[service]["metadata"]["namespace"] == namespace
            assert services[service]["spec"]["ports"][0]["port"] == 80
            (token,) = of_kind("autoscaled", "TriggerAuthentication")[
                trigger["authenticationRef"]["name"]
            ]["spec"]["secretTargetRef"]
            assert (token["name"], token["key"]) == ("baton-api-keys", "api-keys")
    assert set(of_kind("autoscaled", "ScaledObject")) == {"baton-prefill", "baton-decode"}


def test_what_keda_scales_has_no_number_of_its_own() -> None:
    """Else each `kubectl apply` would end the workers that KEDA has added."""
    scaled = {
        each["spec"]["scaleTargetRef"]["name"]: each
        for each in of_kind("autoscaled", "ScaledObject").values()
    }
    for name, deployment in of_kind("autoscaled", "Deployment").items():
        assert ("replicas" in deployment["spec"]) == (name not in scaled)
    for each in scaled.values():
        kinds = [trigger["metricType"] for trigger in each["spec"]["triggers"]]
        assert "AverageValue" in kinds  # without one KEDA refuses `fallback`


def test_the_documents_name_the_version_of_keda_that_has_all_fields() -> None:
    for file in ("README.md", "components/autoscaling/kustomization.yaml"):
        assert re.findall(r"KEDA \(([\d.]+) or newer", (FOLDER / file).read_text()) == [KEDA_SINCE]
    for each in of_kind("autoscaled", "ScaledObject").values():
        assert "behavior" in each["spec"]["fallback"]  # without it an older KEDA would do


def test_the_document_names_every_secret() -> None:
    text = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"secretName: ([\w-]+)", "".join(
        path.read_text() for path in FOLDER.rglob("*.yaml"))))  # fmt: skip
    assert named == {"baton-keys", "baton-api-keys"}
    for each in named:
        assert f"create secret generic {each} " in text


def test_an_option_that_a_command_does_not_have_is_found() -> None:
    (container,) = [c for role, _, c in deployments("cpu") if role == "decode"]
    with pytest.raises(click.UsageError):
        options("cpu", {**container, "args": [*container["args"], "--kv-hosts=x"]})
