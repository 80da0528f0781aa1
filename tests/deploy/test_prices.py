"""Dollars of a plan: by hand on the clusters' files that ship, on a head, and where a price is not known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cli_runner import ask
from helpers import TINY

from mosaic_ray.cli.options import RunOptions, print_plan
from mosaic_ray.config.resolve import as_dict, override, to_toml
from mosaic_ray.deploy import prices
from mosaic_ray.deploy.cluster_spec import Cluster, load, understand
from mosaic_ray.runs.estimate import Hours

REPO = Path(__file__).resolve().parents[2]
FILES = {"aws": "cluster.yaml", "gcp": "clusters/gcp.yaml", "ssh": "clusters/ssh.yaml"}


def cluster(name: str) -> Cluster:
    found = understand(load(str(REPO / FILES[name])))
    assert isinstance(found, Cluster)
    return found


def hours(amount: float) -> Hours:
    return Hours(amount, 1.0, 1.0, 0.0, 2, 1, "stage times of earlier runs here", ())


def test_dollars_by_hand():
    found = prices.cost_of(cluster("aws"), {"gpu": 3}, hours(2.0))
    assert found.dollars == pytest.approx(2.0 * (0.192 + 3 * 1.212))
    assert "1 m5.xlarge at 0.192 + 3 g5.2xlarge at 1.212" in found.line
    assert prices.AS_OF in found.line and "spot machines cost less" in found.line
    assert prices.cost_of(cluster("gcp"), {}, hours(3.0)).dollars == pytest.approx(3 * 0.1942)


def test_an_unknown_machine_has_no_dollars(monkeypatch):
    monkeypatch.setitem(prices.PRICES["aws"], "g5.2xlarge", None)
    found = prices.cost_of(cluster("aws"), {"gpu": 1}, hours(1.0))
    assert found.dollars is None and "no price of g5.2xlarge" in found.line
    assert prices.cost_of(cluster("aws"), {}, hours(1.0)).dollars == pytest.approx(0.192)  # it is not used
    assert prices.cost_of(cluster("ssh"), {}, hours(1.0)).dollars is None


def test_attached_accelerators_are_not_priced():
    kind = cluster("gcp").head
    assert prices.price_of("gcp", kind) == 0.1942
    kind.content["guestAccelerators"] = [{"acceleratorType": "nvidia-tesla-t4"}]
    assert prices.price_of("gcp", kind) is None


def test_the_page_has_the_table():
    page = (REPO / "docs/howto/how-long.md").read_text()
    assert prices.AS_OF in page
    for kinds in prices.PRICES.values():
        for name, price in kinds.items():
            assert f"| `{name}` | {price:g} |" in page, name


@pytest.mark.parametrize("address, printed", [("auto", True), ("local", False)])
def test_a_dry_run_on_a_head_prints_dollars(address, printed, monkeypatch, capsys):
    monkeypatch.setattr(prices, "BOOTSTRAP", str(REPO / "cluster.yaml"))
    place = RunOptions("s", None, address, fresh=False, as_json=False)
    print_plan(place, {}, hours(1.0), lambda nodes: {"gpu": len(nodes) - 1}, "the plan")
    shown = capsys.readouterr().out
    assert shown.startswith("the plan\nhours: about 1 ") and ("dollars: about" in shown) == printed
    print_plan(replace(place, as_json=True), {"name": "n"}, hours(1.0), lambda nodes: {})
    assert (json.loads(capsys.readouterr().out)["dollars"] == pytest.approx(0.192)) == printed


#: Clients that train on GPUs, as the nodes of cluster.yaml have them.
ON_GPUS = override(
    TINY,
    {"method": "fedavg", "runtime.host": "ray", "runtime.device": "cuda", "runtime.gpus_per_client": 0.5,
     "runtime.precision": "bf16"},
)  # fmt: skip


def earlier_run() -> None:
    place = Path("mosaic_runs/runs/a")
    place.mkdir(parents=True)
    stages = {
        name: {"seconds": 3600.0, "client_seconds": 0.0, "cached": False, "key": f"{name}-k"}
        for name in ("partition", "warmup", "evaluate")
    }
    content = {"status": "done", "config": as_dict(ON_GPUS), "stages": stages}
    (place / "summary.json").write_text(json.dumps(content))


def test_the_doctor_gives_hours_and_dollars(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(to_toml(override(ON_GPUS, {"runtime.precision": "bf16"})))
    words = ["doctor", "--cluster", str(REPO / "cluster.yaml"), "--config", "tiny.toml"]
    lines = ask(*words).stdout
    assert "hours: no estimate yet" in lines and "run it once on such machines" in lines and "dollars" not in lines
    earlier_run()
    lines = ask(*words).stdout
    assert "hours: about" in lines and "GPU hours" in lines
    assert "dollars: about" in lines and "m5.xlarge" in lines and "g5.2xlarge" in lines


def test_on_a_head_the_file_of_ray_up_is_priced(tmp_path, monkeypatch):
    monkeypatch.setattr(prices, "BOOTSTRAP", str(tmp_path / "bootstrap.yaml"))
    assert prices.cost_on_head(lambda nodes: {"gpu": 2}, hours(1.0)) is None
    content = yaml.safe_load((REPO / "cluster.yaml").read_text())
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(content))
    found = prices.cost_on_head(lambda nodes: {"gpu": 2}, hours(1.0))
    assert found is not None and found.dollars == pytest.approx(0.192 + 2 * 1.212)
    (tmp_path / "bootstrap.yaml").write_text("provider: 3\n")
    found = prices.cost_on_head(lambda nodes: {"gpu": 2}, hours(1.0))
    assert found is not None and found.dollars is None
