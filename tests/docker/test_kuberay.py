"""The KubeRay manifests: pods and volumes are checked against Kubernetes' schemas, ray.io's fields against a list."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.docker.files import KUBERAY, manifest, pod_templates

KUBERNETES = "1.33"
# The ray.io/v1 fields used here. Both manifests were checked against the CRDs of KubeRay 1.7.0, which are not in this
# repository. A field that is not in this list requires a new check (docs/docker.md says how).
CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
WORKERS = HEAD | {"groupName", "replicas", "minReplicas", "maxReplicas"}
JOB = {"clusterSelector", "entrypoint", "submissionMode"}

GROUPS = sorted(pod_templates())


def test_ray_fields_are_those_checked_against_the_crds() -> None:
    cluster, job = manifest("raycluster.yaml"), manifest("rayjob.yaml")
    assert (cluster["apiVersion"], cluster["kind"], set(cluster["spec"])) == ("ray.io/v1", "RayCluster", CLUSTER)
    assert (job["apiVersion"], job["kind"], set(job["spec"])) == ("ray.io/v1", "RayJob", JOB)
    assert set(cluster["spec"]["headGroupSpec"]) == HEAD
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert set(group) == WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("group", GROUPS)
def test_pods_hold_against_the_schema_of_kubernetes(group: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}, "spec": pod_templates()[group]["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_a_misspelt_field_is_found() -> None:
    spec = {**pod_templates()["head"]["spec"], "securityContxt": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="securityContxt"):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "head"}, "spec": spec}, KUBERNETES, strict=True
        )


def test_volume_claim_holds_against_the_schema_and_is_the_one_that_is_mounted() -> None:
    claim = manifest("runs.yaml")
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in pod_templates().values():
        [runs] = [v for v in template["spec"]["volumes"] if v["name"] == "runs"]
        assert runs["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("group", GROUPS)
def test_pods_run_without_privileges(group: str) -> None:
    spec = pod_templates()[group]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("group", GROUPS)
def test_pods_ask_for_what_they_may_use(group: str) -> None:
    [container] = pod_templates()[group]["spec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == container["image"].endswith("-gpu")
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod_templates()[group]["spec"]["volumes"]} == {"runs", "shm"}


def test_job_runs_on_the_cluster_of_the_other_file() -> None:
    selector = manifest("rayjob.yaml")["spec"]["clusterSelector"]
    assert selector == {"ray.io/cluster": manifest("raycluster.yaml")["metadata"]["name"]}


def test_kustomization_names_files_that_exist() -> None:
    assert all((KUBERAY / name).is_file() for name in manifest("kustomization.yaml")["resources"])


def head_and_cpu_worker() -> list[dict[str, Any]]:
    values = yaml.safe_load((KUBERAY / "values.example.yaml").read_text())
    return [values["head"], values["worker"]]


def test_chart_values_say_what_the_manifest_says() -> None:
    cluster = manifest("raycluster.yaml")["spec"]
    for values, group in zip(
        head_and_cpu_worker(), [cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]], strict=True
    ):
        [container] = group["template"]["spec"]["containers"]
        assert values.get("rayStartParams", {}) == group["rayStartParams"]
        for key in ("resources", "securityContext", "volumeMounts"):
            assert values[key] == container[key]
        pod_security = group["template"]["spec"]["securityContext"]
        assert values["podSecurityContext"].items() <= pod_security.items()
    assert head_and_cpu_worker()[0]["rayVersion"] == cluster["rayVersion"]
