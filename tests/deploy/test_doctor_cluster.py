"""`mosaic doctor --cluster FILE`: each finding is provoked on a changed copy of a shipped file, and absent on it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runner import ask, refusal
from click.testing import Result

from mosaic_ray import __version__

REPO = Path(__file__).resolve().parents[2]
SHIPPED = {
    "aws": "cluster.yaml",
    "gcp": "clusters/gcp.yaml",
    "kuberay": "clusters/kuberay.yaml",
    "ssh": "clusters/ssh.yaml",
}
CONTENT = {
    short: yaml.safe_load((REPO / name).read_text(encoding="utf-8").replace("FILL_IN", "10.0.0.1"))
    for short, name in SHIPPED.items()
}


@pytest.fixture
def study_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `ray up` works from: dist/ with a wheel, a token in HOME."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0" * 64)
    (home / ".ray" / "auth_token").chmod(0o600)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / f"mosaic_ray-{__version__}-py3-none-any.whl").touch()
    (tmp_path / "dist" / "constraints.txt").write_text((REPO / "constraints.txt").read_text())
    monkeypatch.setenv("HOME", str(home))
    nobody = {"clusters": [{"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}], "current-context": "none",
              "contexts": [{"name": "none", "context": {"cluster": "none"}}]}  # fmt: skip
    (home / "kubeconfig").write_text(yaml.safe_dump(nobody))
    monkeypatch.setenv("KUBECONFIG", str(home / "kubeconfig"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


Change = Callable[[dict[str, Any]], object]


def same(content: dict[str, Any]) -> None:
    """No change."""


def examined(short: str, change: Change = same, *words: str) -> Result:
    """Run the doctor on a filled-in and changed copy of a shipped file."""
    content = copy.deepcopy(CONTENT[short])
    change(content)
    Path("changed.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return ask("doctor", "--cluster", "changed.yaml", *words)


def findings(result: Result) -> list[str]:
    """The lines that are not ok."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = result.stdout.splitlines()
    bad = [line for line in lines if not line.startswith("ok ")]
    assert result.exit_code == any(line.startswith("problem") for line in lines), (result.exit_code, lines)
    return bad


def ray_image(content: dict[str, Any], image: str) -> None:
    content["docker"]["image"] = image


def spec(content: dict[str, Any]) -> dict[str, Any]:
    return content["spec"]["rayClusterSpec"]


def pod(content: dict[str, Any], group: str = "gpu") -> dict[str, Any]:
    kind = spec(content)["headGroupSpec"] if group == "head" else spec(content)["workerGroupSpecs"][0]
    return kind["template"]["spec"]


def node(content: dict[str, Any], name: str = "gpu") -> dict[str, Any]:
    return content["available_node_types"][name]


def env(content: dict[str, Any], name: str, value: str) -> None:
    pod(content)["containers"][0]["env"] = [{"name": name, "value": value}]


def swap(content: dict[str, Any], key: str, old: str, new: str) -> None:
    changed = [command.replace(old, new) for command in content[key]]
    assert changed != content[key]
    content[key] = changed


OPEN = {"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}

#: The file, the change in it, and the line that must report it.
PROVOKED: list[tuple[str, Change, str]] = [
    # errors that Ray or KubeRay would report
    ("aws", lambda c: c.update(idle_timeout_minute=3),
     r"problem .*idle_timeout_minute: .*no such key.*\"idle_timeout_minutes\""),
    ("aws", lambda c: c["docker"].update(imag="x"), r"problem .*docker\.imag: .*\"image\""),
    ("gcp", lambda c: node(c).update(max_worker=3), r"problem .*types\.gpu\.max_worker: .*\"max_workers\""),
    ("aws", lambda c: c.update(max_workers="four"), r"problem .*max_workers: 'four' is not of type"),
    ("aws", lambda c: c.update(head_node_type="heda"), r"problem .*head_node_type"),
    ("aws", lambda c: c["provider"].update(type="awss"), r"problem .*provider\.type: .*awss; did you mean .*\"aws\""),
    ("ssh", lambda c: c["provider"].pop("worker_ips"), r"problem .*worker_ips"),
    ("kuberay", lambda c: c["spec"].pop("rayClusterSpec"), r"problem .*rayClusterSpec: missing"),
    ("kuberay", lambda c: pod(c).pop("containers"),
     r"problem .*workerGroupSpecs\.0\.template\.spec\.containers: missing"),
    ("kuberay", lambda c: pod(c)["containers"][0]["resources"]["limits"].update(cpu="4 cores"),
     r"problem .*4 cores is no amount"),
    ("aws", lambda c: c["provider"].update(region="FILL_IN"), r"problem .*fill in: provider\.region has FILL_IN"),
    # versions
    ("aws", lambda c: ray_image(c, "rayproject/ray:2.44.1-py311"),
     r"problem .*versions: image .*Ray 2\.44\.1; .* are here"),
    ("aws", lambda c: ray_image(c, "rayproject/ray:latest"),
     r"problem .*versions: image rayproject/ray:latest does not say"),
    ("aws", lambda c: ray_image(c, "my/mosaic:1"), r"warning .*versions: image my/mosaic:1 does not say"),
    ("aws", lambda c: ray_image(c, "rayproject/ray:2.60.0-py310"), r"problem .*versions: .*Python 3\.10; .*3\.11"),
    ("aws", lambda c: ray_image(c, "rayproject/ray:2.60.0-py319"),
     r"warning .*versions: .*Python 3\.19; .*ray job submit"),
    ("gcp", lambda c: c["setup_commands"].append("pip install 'ray[default]==2.9.0'"),
     r"problem .*setup command: Ray 2\.9\.0"),
    ("kuberay", lambda c: spec(c).update(rayVersion="2.53.0"), r"problem .*versions: rayVersion: Ray 2\.53\.0"),
    ("kuberay", lambda c: spec(c).pop("rayVersion"), r"problem .*versions: rayVersion is missing"),
    ("ssh", lambda c: c.update(setup_commands=["pip install ray mosaic-ray"]), r"problem .*nothing says which Ray"),
    # the project
    ("aws", lambda c: c["setup_commands"].pop(0), r"problem .*project: no setup command installs mosaic-ray"),
    ("aws", lambda c: c["file_mounts"].update({"~/mosaic": "elsewhere"}),
     r"problem .*files: elsewhere.* not here; make wheel"),
    ("kuberay", lambda c: pod(c)["containers"][0].update(image="rayproject/ray:2.60.0-py311-gpu"),
     r"problem .*project: gpu: "),
    # the token
    ("aws", lambda c: c["file_mounts"].pop("~/.ray/auth_token"), r"problem .*token: no file mount"),
    ("aws", lambda c: c["file_mounts"].update({"~/.ray/auth_token": "~/none"}),
     r"problem .*files: ~/none.*get-auth-token"),
    ("aws", lambda c: swap(c, "worker_start_ray_commands", "RAY_AUTH_MODE=token ", ""),
     r"problem .*token: gpu: .*token mode"),
    ("ssh", lambda c: swap(c, "head_start_ray_commands", "RAY_AUTH_MODE=token ", ""),
     r"problem .*token: head: .*token mode"),
    ("kuberay", lambda c: spec(c).pop("authOptions"), r"problem .*token: the cluster asks nobody"),
    # access
    ("aws", lambda c: swap(c, "head_start_ray_commands", "host=127.0.0.1", "host=0.0.0.0"),
     r"problem .*dashboard listens on 0\.0\.0\.0"),
    ("gcp", lambda c: swap(c, "head_start_ray_commands", "--host 127.0.0.1", "--bind_all"),
     r"problem .*access: TensorBoard"),
    ("gcp", lambda c: swap(c, "head_start_ray_commands", "--host 127.0.0.1", "--host ::"),
     r"problem .*access: TensorBoard"),
    ("aws", lambda c: c["provider"].update(security_group={"IpPermissions": [OPEN]}),
     r"problem .*opens ports 8265 to 8265"),
    ("kuberay", lambda c: spec(c)["headGroupSpec"].update(serviceType="LoadBalancer"), r"problem .*LoadBalancer"),
    ("kuberay", lambda c: spec(c)["headGroupSpec"].update(enableIngress=True), r"problem .*enableIngress"),
    # secrets
    ("aws", lambda c: c["setup_commands"].append("aws AKIAABCDEFGHIJKLMNOP"),
     r"problem .*setup_commands\.4 holds an AWS access key"),
    ("aws", lambda c: c["setup_commands"].append("X_SECRET=abcdefgh1 y"),
     r"problem .*setup_commands\.4 holds a secret"),
    ("gcp", lambda c: c["provider"].update(api_key="abcdefgh1"), r"problem .*provider\.api_key holds a secret"),
    ("gcp", lambda c: c["setup_commands"].append("-----BEGIN RSA PRIVATE KEY-----"), r"problem .*holds a private key"),
    ("kuberay", lambda c: env(c, "RAY_AUTH_TOKEN", "abcdefgh1"), r"problem .*gpu: env RAY_AUTH_TOKEN holds a secret"),
    # machines
    ("aws", lambda c: node(c)["node_config"].pop("ImageId"), r"problem .*machines: gpu: no ImageId"),
    ("aws", lambda c: node(c).pop("docker"), r"problem .*machines: gpu: its container is not given the GPUs"),
    ("aws", lambda c: node(c).update(min_workers=2), r"warning .*machines: 2 of gpu run, and cost"),
    ("aws", lambda c: node(c, "head")["node_config"].update(InstanceMarketOptions={"MarketType": "spot"}),
     r"warning .*the head may"),
    ("gcp", lambda c: node(c, "head")["node_config"].update(scheduling=[{"preemptible": True}]),
     r"warning .*the head may"),
    # storage
    ("aws", lambda c: node(c)["node_config"].pop("IamInstanceProfile"),
     r"problem .*storage: gpu: no IamInstanceProfile"),
    ("gcp", lambda c: node(c)["node_config"].pop("serviceAccounts"), r"problem .*storage: gpu: no serviceAccounts"),
    ("kuberay", lambda c: pod(c).pop("serviceAccountName"), r"warning .*storage: gpu: no serviceAccountName"),
    # the plan
    ("aws", lambda c: node(c).update(resources={}), r"warning .*plan: the file does not give the resources of gpu"),
]  # fmt: skip


@pytest.mark.parametrize("short", SHIPPED)
def test_a_shipped_file_that_is_filled_in_is_fit(study_context, short):
    result = examined(short)
    assert findings(result) == []
    assert {"schema:", "token:", "access:", "secrets:", "storage:", "plan:"} <= {
        line.split()[1] for line in result.stdout.splitlines()
    }


@pytest.mark.parametrize("short", SHIPPED)
def test_places_to_fill_in_are_reported(study_context, short):
    lines = findings(ask("doctor", "--cluster", str(REPO / SHIPPED[short])))
    assert lines
    assert all(re.match(r"problem +fill in: \S+ has \S*FILL_IN\S*; put your own", line) for line in lines)


@pytest.mark.parametrize("short, change, line", PROVOKED, ids=[f"{s}-{line[-30:]}" for s, _, line in PROVOKED])
def test_problems_are_reported(study_context, short, change, line):
    lines = findings(examined(short, change))
    assert [text for text in lines if re.match(line, text)], lines


def test_without_a_cluster_kubectl_is_named_for_the_fields_of_a_manifest(study_context):
    lines = examined("kuberay", lambda c: c["spec"].update(entrypont="x")).stdout
    assert "its fields were not checked: " in lines
    assert "`kubectl apply --dry-run=server -f changed.yaml` checks them" in lines


#: kubectl's own words, of 1.32.
UNKNOWN = 'Warning: unknown field "spec.entrypont"'
INVALID = 'The RayJob "mosaic" is invalid: spec.backoffLimit: Invalid value: "string": must be of type integer'


@pytest.mark.parametrize(
    "said, status, line",
    [
        (UNKNOWN, 0, r"warning .*schema: spec\.entrypont: KubeRay knows no such field"),
        (INVALID, 1, r"problem .*schema: The RayJob .* must be of type integer"),
    ],
    ids=["unknown", "invalid"],
)
def test_what_kuberay_says_of_a_manifest_is_reported(study_context, monkeypatch, said, status, line):
    answers_as_kubectl(study_context, monkeypatch, said, status)
    [found] = findings(examined("kuberay"))
    assert re.match(line, found)


def test_a_manifest_that_kuberay_takes_is_called_so(study_context, monkeypatch):
    answers_as_kubectl(study_context, monkeypatch, "", 0)
    assert "changed.yaml is as the cluster's KubeRay takes it" in examined("kuberay").stdout


def answers_as_kubectl(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, status: int) -> None:
    """Put a kubectl on the path that prints ``said`` and ends with ``status`` if it is asked for a server's dry run."""
    script = folder / "bin" / "kubectl"
    script.parent.mkdir()
    wanted = "apply --dry-run=server --request-timeout=10s -f changed.yaml --validate=warn"
    script.write_text(f"#!/bin/sh\n[ \"$*\" = \"{wanted}\" ] || exit 9\necho '{said}' >&2\nexit {status}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


def test_a_secret_is_never_printed(study_context):
    result = examined("aws", lambda c: c["setup_commands"].append("export DB_PASSWORD=hunter2hunter2"))
    assert "holds a secret" in result.stdout
    assert "hunter2" not in result.stdout


def test_a_token_that_others_may_read_is_reported(study_context):
    (study_context / "home" / ".ray" / "auth_token").chmod(0o644)
    [line] = findings(examined("aws"))
    assert re.match(r"warning +token: .*may be read by others.*; chmod 600", line)


@pytest.mark.parametrize("change, line", [
    (lambda dist: (dist / "mosaic_ray-0.0.1-py3-none-any.whl").touch(), "there are 2 such files"),
    (lambda dist: next(dist.glob("*.whl")).unlink(), "there are 0 such files"),
    (lambda dist: next(dist.glob("*.whl")).rename(dist / "mosaic_ray-0.0.1-py3-none-any.whl"), "another version"),
])  # fmt: skip
def test_a_wheel_that_is_not_this_project_is_reported(study_context, change, line):
    change(study_context / "dist")
    [finding] = findings(examined("aws"))
    assert re.match(rf"problem +project: .*{line}.*make wheel", finding)


def test_pins_that_come_along_are_compared(study_context):
    (study_context / "dist" / "constraints.txt").write_text("ray==2.55.0\n")
    [line] = findings(examined("ssh"))
    assert "constraints.txt: Ray 2.55.0" in line


# --- storage that is named -------------------------------------------------------------------------------------------


def test_a_folder_of_one_machine_is_no_storage_of_many(study_context):
    lines = findings(examined("aws", same, "--storage", "/data/mosaic"))
    assert [line for line in lines if re.match(r"problem +storage: /data/mosaic is a folder of one machine", line)]


def test_a_folder_that_all_mount_is(study_context):
    def mounts(content):
        content["initialization_commands"] = ["sudo mount -t nfs4 10.0.0.2:/export /data"]

    assert findings(examined("ssh", mounts, "--storage", "/data/mosaic")) == []
    lines = findings(examined("ssh", mounts, "--storage", "/database"))
    assert "is a folder of one machine" in lines[0]


def test_a_claim_that_all_pods_mount_is(study_context):
    def mounts(content, groups=("head", "gpu")):
        for group in groups:
            pod(content, group)["volumes"] = [{"name": "all", "persistentVolumeClaim": {"claimName": "x"}}]
            pod(content, group)["containers"][0]["volumeMounts"] = [{"name": "all", "mountPath": "/data"}]
        content["spec"]["entrypoint"] = "mosaic sweep --storage /data/mosaic"

    assert findings(examined("kuberay", mounts)) == []
    [line] = findings(examined("kuberay", lambda content: mounts(content, ("head",))))
    assert "is a folder of one machine" in line


def test_a_storage_that_tensorboard_does_not_watch_is_reported(study_context):
    [line] = findings(examined("aws", same, "--storage", "s3://other/mosaic"))
    assert re.match(
        r"warning +storage: results go to s3://other/mosaic, while the file names s3://10\.0\.0\.1/mosaic", line
    )


# --- the plan of a request -------------------------------------------------------------------------------------------


def plan_lines(result: Result) -> str:
    return "\n".join(line for line in result.stdout.splitlines() if re.match(r"\w+ +(plan|node|workers)", line))


def test_the_plan_of_a_run_says_how_many_machines_are_asked_for(study_context):
    quarter = ("--set", "runtime.gpus_per_client=0.25")
    text = plan_lines(examined("aws", same, "--clients", "12", *quarter))
    assert "node head: 4 CPUs, 10.0 GiB: no client host fits" in text
    assert "node gpu: 8 CPUs, 1 GPU, 20.0 GiB: 4 client hosts fit" in text
    assert "client hosts: 12, up to 1 of the run's 12 clients" in text
    assert "the server's work: one worker with 0.25 GPU beside them" in text
    assert "asked for 4 of gpu (at most 4)" in text
    text = plan_lines(examined("aws", same, "--clients", "11", *quarter))
    assert "asked for 3 of gpu (at most 4)" in text
    text = plan_lines(examined("aws", same, "--clients", "40", *quarter))
    assert "client hosts: 15, up to 3 of the run's 40 clients" in text
    assert "asked for 4 of gpu (at most 4)" in text
    on_cpus = ("--set", "runtime.device=cpu")
    assert "asked for 0 of gpu" in plan_lines(examined("aws", same, "--clients", "4", *on_cpus))  # the head's CPUs do
    assert "asked for 3 of gpu" in plan_lines(examined("aws", same, "--clients", "2"))  # by themselves
    assert "asked for 1 of gpu" in plan_lines(examined("aws", same, "--clients", "5", *on_cpus))


def test_train_workers_count_when_the_clients_have_gone(study_context):
    half = ("--clients", "2", "--set", "runtime.gpus_per_client=0.5", "--set")
    text = plan_lines(examined("aws", same, *half, "distill.workers=3"))
    assert "Train workers: 3" in text
    assert "asked for 3 of gpu" in text
    [line] = findings(examined("aws", same, *half, "distill.workers=5"))
    assert re.match(r"problem +plan: distill\.workers = 5: all machines together have 4 GPUs", line)


def test_the_plan_of_a_sweep_is_the_sweeps_own(study_context):
    half = ("--space", "smoke", "--set", "runtime.gpus_per_client=0.5")
    text = plan_lines(examined("aws", same, *half))
    assert re.search(r"kept free for the server's work and Ray Train: \d workers?.*, each 1 CPU, 0\.5 GPU", text)
    assert re.search(r"asked for [1-4] of gpu", text)
    grid = plan_lines(examined("aws", same, "--grid", "meta.pool=sum,mean", *half[2:]))
    assert re.search(r"kept free for the server's work and Ray Train: \d", grid)
    assert "trials at once" in plan_lines(examined("aws", same, *half, "--storage", "./here"))  # on the head
    lines = findings(examined("aws", same, *half, "--storage", "./here", "--host", "serial"))
    assert [line for line in lines if re.match(r"problem +plan: .*0 on head, where trials run", line)]


def test_a_run_in_one_process_asks_for_no_machine(study_context):
    text = plan_lines(examined("aws", same, "--host", "serial"))
    assert "asked for 0 of gpu" in text
    assert "runtime.host = serial" in text


def test_a_client_that_fits_no_machine_is_a_problem(study_context):
    [line] = findings(examined("aws", same, "--set", "runtime.gpus_per_client=2"))
    assert re.match(r"problem +plan: runtime\.gpus_per_client = 2: .*at most 1 on one node", line)
    [line] = findings(examined("kuberay", same, "--set", "runtime.cpus_per_client=16"))
    assert re.match(r"problem +plan: runtime\.cpus_per_client = 16", line)


def test_the_limit_of_all_workers_binds_and_gpus_come_first_where_they_are_asked_for(study_context):
    def two_kinds(content):
        head = node(content, "head")["node_config"]
        content["max_workers"] = 3
        content["available_node_types"]["cpu"] = {
            "resources": {"CPU": 16, "memory": 2**35}, "node_config": head, "max_workers": 9,
        }  # fmt: skip

    text = plan_lines(examined("aws", two_kinds, "--clients", "99", "--set", "runtime.gpus_per_client=1"))
    assert "asked for 3 of gpu (at most 4), 0 of cpu (at most 9)" in text
    text = plan_lines(examined("aws", two_kinds, "--clients", "99", "--set", "runtime.device=cpu"))
    assert "asked for 0 of gpu (at most 4), 3 of cpu (at most 9)" in text


# --- requests that are wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, line", [
    (None, "cannot be read (No such file or directory)"),
    ("a: [1\nb: 2", "it is not YAML (line 2: "),
    ("just words", "neither a file for `ray up`"),
    ("", "neither a file for `ray up`"),
    ("- 1\n- 2", "neither a file for `ray up`"),
    ("provider: aws", "neither a file for `ray up`"),
    ("kind: RayServe\napiVersion: ray.io/v1", "kind RayJob or RayCluster"),
    ("a: !!python/object/apply:os.system ['touch ran']", "it is not YAML (line 1: "),
])  # fmt: skip
def test_a_file_that_is_none_is_refused_in_one_line(study_context, text, line):
    if text is not None:
        (study_context / "file.yaml").write_text(text)
    message = refusal(ask("doctor", "--cluster", "file.yaml"))
    assert message.startswith("mosaic: error: --cluster file.yaml: ")
    assert line in message
    assert not (study_context / "ran").exists()


def test_words_that_belong_elsewhere_are_refused(study_context):
    assert "--cluster" in refusal(ask("doctor", "--space", "smoke"))
    assert "--grid meta.pool=sum: it goes with --cluster" in refusal(ask("doctor", "--grid", "meta.pool=sum"))
    assert "runtime.gpus_per_client" in refusal(
        ask("doctor", "--cluster", "x.yaml", "--set", "runtime.gpus_per_client=-1")
    )
