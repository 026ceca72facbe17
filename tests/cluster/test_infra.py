"""infra/: manifests, images, cluster and monitoring files, and that every command in them is one of ours."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay_schema import RESOURCES
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from cluster import submit
from cluster.encoder_places import engine_config
from cluster.main import completed
from cluster.metrics import GAUGES
from talk_dist.cli import COMMANDS
from talk_dist.commands.settings import read
from talk_dist.resources import DeepSpeedConfig

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
PINS = {
    r.name: str(r.specifier)
    for r in map(Requirement, re.findall(r"^\w.*", (ROOT / "constraints/cpu.txt").read_text(), re.M))
}
RAY = PINS["ray"].removeprefix("==")
IMAGES = sorted(INFRA.glob("Dockerfile*"))


def documents(name: str) -> dict[str, Any]:
    """The documents of a manifest by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((INFRA / "kuberay" / name).read_text())}


JOB_DOCUMENTS, CLUSTER_DOCUMENTS = documents("rayjob.yaml"), documents("raycluster.yaml")
SPEC = JOB_DOCUMENTS["RayJob"]["spec"]
CLUSTERS = [SPEC["rayClusterSpec"], CLUSTER_DOCUMENTS["RayCluster"]["spec"]]


@pytest.mark.parametrize(
    "document", [JOB_DOCUMENTS["RayJob"], CLUSTER_DOCUMENTS["RayCluster"]], ids=lambda d: d["kind"]
)
def test_manifests_have_the_structure_of_the_crds(document: dict[str, Any]) -> None:
    jsonschema.validate(document, RESOURCES[document["kind"]])


@pytest.mark.parametrize("cluster", CLUSTERS, ids=["job", "cluster"])
def test_pods_mount_what_exists_and_run_where_they_should(cluster: dict[str, Any]) -> None:
    claim = documents("storage.yaml")["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        spot = pod["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
        assert spot == (group is not groups[0])
        tolerated = {toleration["key"] for toleration in pod.get("tolerations", [])}
        assert ("karpenter.sh/capacity-type" in tolerated) == spot
        assert ("nvidia.com/gpu" in tolerated) == ("nvidia.com/gpu" in container["resources"]["limits"])
        if "replicas" in group:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    ports = {port["containerPort"] for port in groups[0]["template"]["spec"]["containers"][0]["ports"]}
    assert {6379, 8265, 8080} <= ports
    assert groups[0]["rayStartParams"]["num-cpus"] == "0"


def test_the_job_s_command_parses_and_fits_its_cluster(tmp_path: Path) -> None:
    config = JOB_DOCUMENTS["ConfigMap"]
    pod = SPEC["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in pod["volumes"]
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text)
    python, flag, module, *words = shlex.split(SPEC["entrypoint"].replace("/app/config", str(tmp_path)))
    assert (python, flag, module) == ("python", "-m", "cluster.main")
    submit.validated(completed(words))
    options, settings, _ = read(COMMANDS["distill"], completed(words)[1:])
    assert options.resume == "auto"  # what a retry counts on
    assert SPEC["backoffLimit"] > 0
    assert settings is not None
    assert settings.runtime.kind == "ray"
    workers, shards = settings.deepspeed, settings.cluster
    (group,) = SPEC["rayClusterSpec"]["workerGroupSpecs"]
    one = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers.workers * workers.gpus + shards.actors * shards.gpus <= group["replicas"] * int(
        one["nvidia.com/gpu"]
    )
    assert max(workers.cpus, shards.cpus) <= int(one["cpu"])


@pytest.mark.parametrize("text", [SPEC["runtimeEnvYAML"], (INFRA / "runtime_env.yaml").read_text()])
def test_runtime_environments_are_ones_of_ray(text: str) -> None:
    env = RuntimeEnv(**yaml.safe_load(text))
    assert all(isinstance(value, str) for value in env["env_vars"].values())
    assert not [name for name in env["env_vars"] if "TOKEN" in name and name != "TOKENIZERS_PARALLELISM"]


def test_the_cluster_launcher_s_file() -> None:
    config = yaml.safe_load((INFRA / "cluster-launcher.yaml").read_text())
    validate_config(prepare_config(config))  # as `ray up` does: against ray-schema.json, defaults filled in
    types = config["available_node_types"]
    spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert config["head_node_type"] in types
    assert spot == set(types) - {config["head_node_type"]}
    commands = [c for name, listed in config.items() if name.endswith("_commands") for c in listed]
    assert len(commands) > 5
    for command in commands:
        check_bash(command)
    assert any(f"ray[default]=={RAY}" in command for command in commands)


def check_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, f"{script}\n{done.stderr}"


def steps(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of every step; comments gone, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


@pytest.mark.parametrize("dockerfile", IMAGES, ids=lambda path: path.name)
def test_images_build_from_what_is_here(dockerfile: Path) -> None:
    found = steps(dockerfile)
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    known = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER"}
    assert {word for word, _ in found} <= known
    for word, rest in found:
        if word == "RUN":
            check_bash(rest)
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.strip("/") not in ignored
    script = " ".join(rest for word, rest in found if word == "RUN")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r'"\.\[([\w,]+)\]"', script):
        assert set(names.split(",")) <= set(extras)
        assert {"tune", "deepspeed"} <= set(names.split(","))  # what `cluster.submit` can ask of it (tune has ray)
    for path in re.findall(r"pip install -c (\S+)", script):
        assert (ROOT / path).exists()
    for package in ("talk_dist", "cluster"):
        assert package not in ignored
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1  # a virtual environment moves only between equal Pythons


def test_nothing_runs_as_root() -> None:
    for image in IMAGES:
        users = [rest for word, rest in steps(image) if word == "USER"]
        assert users == ["10001:10001"]
        assert "--uid 10001" in image.read_text()
    for cluster in CLUSTERS:
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            context = group["template"]["spec"]["securityContext"]
            assert {context["runAsUser"], context["runAsGroup"], context["fsGroup"]} == {10001}


def test_versions_of_ray_agree() -> None:
    import ray

    assert ray.__version__ == RAY
    assert f"ray[default]=={RAY}" in (INFRA / "Dockerfile.cuda").read_text()
    assert {"torch", "deepspeed", "ray"} <= set(PINS)


DEEPSPEED = {path.stem: json.loads(path.read_text()) for path in (INFRA / "deepspeed").glob("*.json")}


def test_deepspeed_files_say_what_our_settings_mean() -> None:
    meant = {f"zero{stage}": engine_config(DeepSpeedConfig(workers=1, stage=stage)) for stage in (0, 1, 2, 3)}
    meant["zero3-offload"] = engine_config(DeepSpeedConfig(workers=1, stage=3, offload=True))
    assert meant == DEEPSPEED


def test_deepspeed_reads_these_files() -> None:
    """In a process of its own: importing deepspeed changes the one that does it."""
    code = (
        "import json, sys\n"
        "from deepspeed.runtime.config import DeepSpeedConfig\n"
        "for name, tree in json.load(sys.stdin).items():\n"
        "    print(name, int(DeepSpeedConfig(tree).zero_config.stage))\n"
    )
    pytest.importorskip("deepspeed")
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(DEEPSPEED), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in DEEPSPEED:
        assert f"{name} {name[4]}" in done.stdout


def test_the_dashboard_shows_every_gauge() -> None:
    """And none that does not exist, with the labels that it has."""
    dashboard = json.loads((INFRA / "grafana/talk-dist.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"ray_(talk_dist_\w+)", query)}
    assert named == set(GAUGES)
    for query in queries:
        for name in re.findall(r"ray_(talk_dist_\w+)", query):
            assert set(re.findall(r"by \((\w+)\)", query)) <= set(GAUGES[name][1]), query
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__all"} <= variables


def test_prometheus_finds_the_nodes() -> None:
    config = yaml.safe_load((INFRA / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]


README = (INFRA / "README.md").read_text(encoding="utf-8")
SHOWN = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", SHOWN)
def test_commands_of_the_readme(line: str) -> None:
    check_bash(line)
    words = shlex.split(line)
    if words[0] == "talk-dist":
        read(COMMANDS[words[1]], words[2:])
    if words[:3] == ["python", "-m", "cluster.submit"]:
        options, rest = submit.parse(words[3:])
        assert options.address
        if not (options.logs or options.stop):
            submit.validated(completed(rest))
    if words[:3] == ["ray", "job", "submit"]:
        submit.validated(completed(words[words.index("cluster.main") + 1 :]))
    for path in re.findall(r"infra/[\w./-]+", line):
        assert (ROOT / path).exists()


def test_links_of_the_readme() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not (INFRA / link).exists()] == []
    shown = {path.name for path in INFRA.rglob("*") if path.is_file() and path.parent.name != "deepspeed"} - {
        "README.md"
    }
    assert {name for name in shown if name not in README} == set()
