"""The cluster files that ship: Ray accepts them, simulated AWS starts their machines, and no version is given twice."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_readme import mosaic_words, parse

from mosaic_ray.deploy.cluster_spec import Cluster, cluster_spec, load, quantity, understand

REPO = Path(__file__).resolve().parents[2]
SHIPPED = ["cluster.yaml", "clusters/gcp.yaml", "clusters/kuberay.yaml", "clusters/ssh.yaml"]
FOR_RAY_UP = [name for name in SHIPPED if "kuberay" not in name]
CLOUDS = ["cluster.yaml", "clusters/gcp.yaml"]


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((REPO / name).read_text(encoding="utf-8"))


def pinned(name: str) -> str:
    return re.search(rf"^{name}==(\S+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)[1]


def test_every_cluster_file_is_known_here():
    found = {"cluster.yaml", *(f"clusters/{path.name}" for path in (REPO / "clusters").iterdir())}
    assert found == {*SHIPPED, "clusters/slurm.sh"}  # test_slurm.py


@pytest.mark.parametrize("name", FOR_RAY_UP)
def test_ray_takes_it(name, monkeypatch):
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(REPO)
    validate_config(prepare_config(read(name)))
    with pytest.raises(Exception, match="idle_timeout_hours"):
        validate_config(prepare_config(read(name)) | {"idle_timeout_hours": 1})


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_understood_without_a_fault(name):
    cluster = understand(load(str(REPO / name)))
    assert isinstance(cluster, Cluster)
    assert cluster.workers


@pytest.mark.parametrize("name", SHIPPED)
def test_ray_and_python_have_the_projects_versions_and_are_given_once(name):
    text = re.sub(r"#.*", "", (REPO / name).read_text())
    versions = re.findall(r"\d+\.\d+\.\d+(?=-py|\")", text)
    shown = re.findall(r"\d+\.\d+\.\d+(?=-py)", (REPO / "docs" / "CLUSTER.md").read_text())
    assert set(versions) | set(shown) <= {pinned("ray")}
    if name == "clusters/ssh.yaml":
        assert versions == []
        assert "-c ~/mosaic/constraints.txt" in text
    else:
        assert len(versions) == (2 if "kuberay" in name else 1)  # KubeRay asks for the version beside the image
        assert "-py311" in text


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_are_spot_and_none_waits_while_the_head_stays(name):
    cluster = understand(load(str(REPO / name)))
    assert not cluster.head.spot
    assert [(kind.spot, kind.least, kind.gpus, kind.most) for kind in cluster.workers] == [(True, 0, 1.0, 4)]
    assert cluster.content["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("name", FOR_RAY_UP)
def test_its_commands_are_shell_and_install_the_one_wheel_there_is(name):
    content = read(name)
    commands = [command for key, listed in content.items() if key.endswith("_commands") for command in listed]
    assert commands
    for command in commands:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, ""), command
    setup = " ".join(content["setup_commands"])
    assert re.search(r"~/mosaic/(mosaic_ray-)?\*\.whl", setup)
    assert content["file_mounts"]["~/mosaic"] == "dist"
    assert re.search(r"^\tcp constraints.txt cli.py dist/$", (REPO / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", CLOUDS)
def test_tensorboard_and_the_dashboard_listen_on_loopback(name):
    starts = read(name)["head_start_ray_commands"]
    assert any("--dashboard-host=127.0.0.1" in command and "RAY_AUTH_MODE=token" in command for command in starts)
    assert any(re.match(r"nohup tensorboard .*--host 127.0.0.1 --port 6006", command) for command in starts)


# --- AWS, pretended --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """cluster.yaml after Ray's bootstrap, on AWS simulated by moto; HOME is an empty folder."""
    moto = pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    from ray.autoscaler._private.aws import utils
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config

    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.chdir(REPO)
        for cached in (utils.resource_cache, utils.client_cache):
            cached.cache_clear()
        for name in ("mosaic-head", "mosaic-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        yield bootstrap_aws(prepare_config(read("cluster.yaml")))
        for cached in (utils.resource_cache, utils.client_cache):
            cached.cache_clear()


def test_aws_opens_ssh_to_the_world_and_nothing_else(aws):
    import boto3

    groups = {
        group for kind in aws["available_node_types"].values() for group in kind["node_config"]["SecurityGroupIds"]
    }
    found = boto3.client("ec2", aws["provider"]["region"]).describe_security_groups(GroupIds=sorted(groups))
    rules = [rule for group in found["SecurityGroups"] for rule in group["IpPermissions"]]
    assert rules
    to_world = [rule for rule in rules if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) for rule in to_world] == [(22, 22, "tcp")]
    among = [pair["GroupId"] for rule in rules if rule not in to_world for pair in rule["UserIdGroupPairs"]]
    assert set(among) == groups


def test_aws_gets_a_key_that_only_its_owner_reads(aws):
    key = Path(aws["auth"]["ssh_private_key"])
    assert key.parent == Path.home() / ".ssh"
    assert key.stat().st_mode & 0o777 == 0o600
    assert "PRIVATE KEY" in key.read_text()
    assert {kind["node_config"]["KeyName"] for kind in aws["available_node_types"].values()} == {key.stem}


def test_aws_keeps_the_roles_that_the_file_names_and_makes_none_of_its_own(aws):
    import boto3

    profiles = {name: kind["node_config"]["IamInstanceProfile"] for name, kind in aws["available_node_types"].items()}
    assert profiles == {"head": {"Name": "mosaic-head"}, "gpu": {"Name": "mosaic-worker"}}
    assert aws["head_node"] == {}
    assert boto3.client("iam").list_roles()["Roles"] == []


def test_aws_takes_the_roles_that_the_page_makes(aws):
    """IAM accepts the policies of docs/CLUSTER.md; the head may pass the role that its workers get."""
    import boto3

    iam, text = boto3.client("iam"), (REPO / "docs" / "CLUSTER.md").read_text()
    policies = dict(re.findall(r"^cat > (\w+)\.json <<EOF\n(.*?)^EOF", text, re.MULTILINE | re.DOTALL))
    assert set(policies) == {"trust", "bucket", "workers"}
    iam.create_role(RoleName="tried", AssumeRolePolicyDocument=policies.pop("trust"))
    try:
        for name, policy in policies.items():
            iam.put_role_policy(RoleName="tried", PolicyName=name, PolicyDocument=policy.replace("$BUCKET", "b"))
    finally:
        for name in iam.list_role_policies(RoleName="tried")["PolicyNames"]:
            iam.delete_role_policy(RoleName="tried", PolicyName=name)
        iam.delete_role(RoleName="tried")
    worker = aws["available_node_types"]["gpu"]["node_config"]["IamInstanceProfile"]["Name"]
    assert f'"iam:PassRole", "Resource": "arn:aws:iam::*:role/{worker}"' in policies["workers"]


def test_aws_starts_such_machines(aws):
    """The parameters are EC2's RunInstances parameters: botocore refuses a misspelt one before it sends anything."""
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(aws["provider"], aws["cluster_name"])
    for name, kind in aws["available_node_types"].items():
        assert kind["node_config"]["SubnetIds"]
        provider.create_node(copy.deepcopy(kind["node_config"]), {"ray-user-node-type": name}, 1)
    wrong = aws["available_node_types"]["gpu"]["node_config"] | {"InstanceKind": "g5.2xlarge"}
    with pytest.raises(Exception, match="InstanceKind"):
        provider.create_node(copy.deepcopy(wrong), {}, 1)
    started = boto3.client("ec2", aws["provider"]["region"]).describe_instances()["Reservations"]
    machines = [machine for reservation in started for machine in reservation["Instances"]]
    found = {machine["InstanceType"]: machine.get("InstanceLifecycle") for machine in machines}
    assert found == {"m5.xlarge": None, "g5.2xlarge": "spot"}


# --- KubeRay ---------------------------------------------------------------------------------------------------------


def test_the_kuberay_job_has_what_its_definition_requires():
    content = read("clusters/kuberay.yaml")
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayJob")
    spec = cluster_spec(content)
    assert content["spec"]["shutdownAfterJobFinishes"] is True
    assert spec["authOptions"] == {"mode": "token"}
    assert isinstance(spec["rayVersion"], str)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert isinstance(group["rayStartParams"], dict)
        [container] = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert quantity(container["resources"]["limits"]["memory"]) > 8 * 2**30
    [gpu] = spec["workerGroupSpecs"]
    assert gpu["minReplicas"] == 0 < gpu["replicas"] <= gpu["maxReplicas"]


def test_the_kuberay_entrypoint_is_a_command_of_ours():
    entrypoint = read("clusters/kuberay.yaml")["spec"]["entrypoint"]
    assert parse(mosaic_words(entrypoint)).info_name == "sweep"


# --- the pages about them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docs/CLUSTER.md", *SHIPPED])
def test_the_commands_that_are_shown_exist(name):
    text = (REPO / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^#?\s*((?:make|mosaic|python) .*?)(?:  .*)?$", text, re.MULTILINE)
    inner = re.findall(r"'(mosaic [^']*)'|-- (python cli\.py .*?)(?:  .*)?$", text, re.MULTILINE)
    shown = [*lines, *(one or other for one, other in inner)]
    asked = [words for line in shown if (words := mosaic_words(line.partition(";")[0])) is not None]
    assert asked or name == "clusters/ssh.yaml"
    for words in asked:
        parse(words)
