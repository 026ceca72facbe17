"""The structure that the CRDs of KubeRay 1.5 ask for (ray.io/v1), with the pods' fields that our manifests use.

Written by hand from the API reference; a field that is not listed is refused, so that a typo does not pass.
"""

from __future__ import annotations

from typing import Any


def obj(required: dict[str, Any], optional: dict[str, Any] | None = None, more: bool = False) -> dict[str, Any]:
    """A JSON schema: an object that has these fields, may have those, and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": more,
    }


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = obj({"cpu": TEXT, "memory": {"type": "string", "pattern": r"^\d+(Gi|Mi)$"}}, {"nvidia.com/gpu": TEXT})
CONTAINER = obj(
    {"name": TEXT, "image": TEXT, "resources": obj({"requests": QUANTITIES, "limits": QUANTITIES})},
    {
        "ports": {"type": "array", "items": obj({"name": TEXT, "containerPort": COUNT})},
        "env": {"type": "array", "items": obj({"name": TEXT, "value": TEXT})},
        "volumeMounts": {"type": "array", "items": obj({"name": TEXT, "mountPath": TEXT}, {"readOnly": FLAG})},
    },
)
VOLUME = obj(
    {"name": TEXT},
    {
        "persistentVolumeClaim": obj({"claimName": TEXT}),
        "configMap": obj({"name": TEXT}),
        "emptyDir": obj({"medium": {"const": "Memory"}, "sizeLimit": TEXT}),
    },
)
TOLERATION = obj({"key": TEXT, "operator": {"enum": ["Exists", "Equal"]}, "effect": TEXT}, {"value": TEXT})
SECURITY = obj({"runAsNonRoot": {"const": True}, "runAsUser": COUNT, "runAsGroup": COUNT, "fsGroup": COUNT})
POD = obj(
    {
        "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
        "restartPolicy": {"const": "Never"},  # what SidecarMode, retries and the autoscaler count on
        "volumes": {"type": "array", "items": VOLUME},
        "nodeSelector": TEXTS,
        "securityContext": SECURITY,
    },
    {"tolerations": {"type": "array", "items": TOLERATION}, "terminationGracePeriodSeconds": COUNT},
)
TEMPLATE = obj({"spec": POD}, {"metadata": obj({"labels": TEXTS})})
WORKERS = obj(
    {
        "groupName": TEXT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "replicas": COUNT,
        "rayStartParams": TEXTS,
        "template": TEMPLATE,
    }
)
AUTOSCALER = obj(
    {},
    {
        "version": {"enum": ["v1", "v2"]},
        "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
        "idleTimeoutSeconds": COUNT,
        "resources": obj({"requests": QUANTITIES, "limits": QUANTITIES}),
    },
)
CLUSTER = obj(
    {
        "headGroupSpec": obj({"rayStartParams": TEXTS, "template": TEMPLATE}),
        "rayVersion": TEXT,
        "authOptions": obj({"mode": {"const": "token"}}),
        "workerGroupSpecs": {"type": "array", "items": WORKERS, "minItems": 1},
    },
    {"enableInTreeAutoscaling": FLAG, "autoscalerOptions": AUTOSCALER},
)
JOB = obj(
    {"entrypoint": TEXT, "rayClusterSpec": CLUSTER},
    {
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        "submitterConfig": obj({"backoffLimit": COUNT}),
        "backoffLimit": COUNT,
        "shutdownAfterJobFinishes": FLAG,
        "ttlSecondsAfterFinished": COUNT,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "runtimeEnvYAML": TEXT,
    },
)
HEAD = {"apiVersion": {"const": "ray.io/v1"}, "metadata": obj({"name": TEXT})}
RESOURCES = {
    "RayJob": obj(HEAD | {"kind": {"const": "RayJob"}, "spec": JOB}),
    "RayCluster": obj(HEAD | {"kind": {"const": "RayCluster"}, "spec": CLUSTER}),
}
