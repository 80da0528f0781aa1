"""Partitions by name: the rows of a CSV file, and the values of a column."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runner import ask
from dealing import labels_of
from helpers import TINY, stripes_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import encoded, load, noise, write_parquet

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import PartitionConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.types import Dataset, Groups
from mosaic_ray.data import groups as groups_module
from mosaic_ray.data.catalog import import_dataset
from mosaic_ray.data.flwr import sampler_of
from mosaic_ray.data.groups import with_groups
from mosaic_ray.data.partition import partition
from mosaic_ray.pipeline.graph import KeyInputs
from mosaic_ray.pipeline.stages import PARTITION
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys

STRIPES = stripes_dataset()
ROWS = [(row % 3, row) for row in range(240)]


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: str, pairs: list[tuple[int, int]], head: str = "client,row") -> str:
    Path(path).write_text("\n".join([head, *(f"{client},{row}" for client, row in pairs)]) + "\n")
    return f"file:{path}"


def dealt(sampler: str, data: Dataset = STRIPES, clients: int = 3, seed: int = 0, **knobs) -> list[np.ndarray]:
    section = PartitionConfig(num_clients=clients, sampler=sampler, **knobs)
    found = with_groups(data, [section])
    return partition(data.train.labels, section, seed, found.facts.num_classes, found.groups)


def refusal(sampler: str, **knobs) -> str:
    with pytest.raises(RequestError) as caught:
        dealt(sampler, **knobs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def partition_key(config, data: Dataset) -> str:
    data = with_groups(data, [config.partition])
    digests = {sampler: groups.digest for sampler, groups in data.groups.items()}
    return PARTITION.keys(KeyInputs(config, data.identity, data.facts, groups=digests), {})[0]


# --- file:PATH -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_clients_have_the_rows_of_the_file_each_once(tmp_path_factory, data):
    clients, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 9))
    count = data.draw(st.integers(clients, 240))
    rows = data.draw(st.permutations(range(240)))[:count]
    pairs = [(k % clients, row) for k, row in enumerate(rows)]
    path = tmp_path_factory.mktemp("rows") / "deal.csv"
    shards = dealt(write_rows(str(path), pairs), clients=clients, seed=seed, min_size=1)
    assert [sorted(shard.tolist()) for shard in shards] == [
        sorted(row for client, row in pairs if client == k) for k in range(clients)
    ]
    path.unlink()
    again = dealt(write_rows(str(path), data.draw(st.permutations(pairs))), clients=clients, seed=seed, min_size=1)
    assert all(map(np.array_equal, shards, again)), "the order of the lines changes nothing"


def test_a_shard_is_shuffled_by_the_seed():
    sampler = write_rows("deal.csv", ROWS)
    one, two = dealt(sampler), dealt(sampler, seed=1)
    assert not np.array_equal(one[0], np.sort(one[0])) and not np.array_equal(one[0], two[0])
    assert sorted(one[0]) == sorted(two[0])


def test_the_content_is_in_the_key_and_the_path_is_not():
    def key(sampler: str, **more) -> str:
        return partition_key(
            override(TINY, {"partition.sampler": sampler, "partition.num_clients": 3, **more}), STRIPES
        )

    first = key(write_rows("deal.csv", ROWS))
    assert key(write_rows("other.csv", ROWS[::-1])) == first
    Path("more.csv").write_text("row,who,client\n" + "".join(f"{row},ann,{client}\n" for client, row in ROWS))
    assert key("file:more.csv") == first, "further columns are ignored"
    moved = [(1 - client, row) if client < 2 else (client, row) for client, row in ROWS]
    assert key(write_rows("moved.csv", moved)) != first
    assert key(write_rows("deal.csv", ROWS[:-1])) != first, "the same path, another content"
    assert key("file:other.csv", seed=5) != first != key("iid")


def test_a_dry_run_knows_the_content_without_the_images():
    config = override(TINY, {"partition.sampler": write_rows("deal.csv", ROWS), "partition.num_clients": 3})
    first = stage_keys(config)
    assert stage_keys(override(config, {"partition.sampler": write_rows("other.csv", ROWS)})) == first
    write_rows("deal.csv", ROWS[:-3])
    os.utime("deal.csv", ns=(1, 1))
    assert stage_keys(config)["partition"] != first["partition"]


def test_rows_that_no_line_names_are_left_out_and_counted(capsys):
    shards = dealt(write_rows("deal.csv", ROWS[:200]))
    assert sorted(np.concatenate(shards)) == list(range(200))
    [line] = capsys.readouterr().err.splitlines()
    assert "40 of 240 training images go to no client (40 have no row)" in line
    dealt(write_rows("deal.csv", ROWS))
    assert capsys.readouterr().err == ""


FILES = {
    "no such file": (None, "No such file"),
    "empty": ("", "Empty CSV"),
    "no lines": ("client,row\n", "no lines"),
    "other columns": ("user,row\n0,1\n", 'header is "user,row"'),
    "words": ("client,row\nann,1\n", "'ann'"),
    "fractions": ("client,row\n0.5,1\n", "'0.5'"),
    "a gap": ("client,row\n0,\n", "lacks a number"),
    "too few fields": ("client,row\n0\n", "Expected 2 columns"),
    "a row twice": ("client,row\n0,7\n1,8\n1,7\n", "row 7 is there twice"),
    "below 0": ("client,row\n0,-1\n", "below 0"),
    "a huge number": (f"client,row\n0,{10**30}\n", str(10**30)),
    "a client that lacks": ("client,row\n0,1\n2,2\n", "clients go up to 2, and 1 has no row"),
    "row out of range": ("client,row\n0,1\n1,240\n", "row 240, and rows run from 0 to 239"),
    "not text": ("client,row\n\0\0,\xff\n", "CSV"),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files_are_refused_in_a_line(case):
    content, says = FILES[case]
    if content is not None:
        Path("deal.csv").write_bytes(content.encode("latin1"))
    message = refusal("file:deal.csv", min_size=1)
    assert message.startswith("partition.sampler = file:deal.csv: ") and says in message


def test_what_is_no_file_or_too_large_is_refused(place, monkeypatch):
    assert "it is a folder" in refusal(f"file:{place}")
    os.mkfifo("pipe")
    assert "it is a pipe" in refusal("file:pipe")
    assert "folder" in refusal("file:")
    monkeypatch.setattr(groups_module, "MOST_CSV", 1000)
    assert "bytes are too many" in refusal(write_rows("deal.csv", ROWS))


def test_the_number_of_clients_is_the_files():
    sampler = write_rows("deal.csv", ROWS)
    for clients in (2, 4):
        message = refusal(sampler, clients=clients)
        assert f"3 clients, and partition.num_clients = {clients}; give --clients 3" in message


def test_a_client_with_too_few_images_is_refused():
    pairs = [(min(row // 9, 1), row) for row in range(240)]
    assert "1 of 2 clients have partition.min_size = 10" in refusal(write_rows("deal.csv", pairs), clients=2)
    assert len(dealt("file:deal.csv", clients=2, min_size=9)[0]) == 9


# --- natural:COLUMN --------------------------------------------------------------------------------------------------

WRITERS = ["zoe", "bob", "ann", None, "bob", "zoe", "eve", "bob", "zoe", "ann", "ann", "zoe"]


def write_written(folder: str, writers: list = WRITERS, bad: tuple[int, ...] = ()) -> np.ndarray:
    """Write images with the columns ``writer``, ``number`` and ``score``; return the training labels."""
    pictures = [b"x" if row in bad else encoded(image) for row, image in enumerate(noise(len(writers), 8, 8, 3))]
    labels = [row % 2 for row in range(len(writers))]
    half = len(writers) // 2
    for part, rows in (("train-0", slice(half)), ("train-1", slice(half, None)), ("test", slice(4))):
        path = Path(folder, f"{part}.parquet")
        write_parquet(path, [encoded(noise(8, 8))] * 4 if part == "test" else pictures[rows], labels[rows])
        table = pq.read_table(path).append_column("writer", pa.array(writers[rows], pa.string()))
        length = len(labels[rows])
        table = table.append_column("number", pa.array([10 - row % 3 for row in range(length)], pa.int16()))
        pq.write_table(table.append_column("score", pa.array([0.5] * length)), path, row_group_size=3)
    return np.array(labels)


def rows_of(word: str) -> list[int]:
    return [row for row, writer in enumerate(WRITERS) if writer == word]


@pytest.mark.parametrize("kind", ["parquet:p", "hf:me/pics", "imported:mine"])
def test_each_client_has_the_images_of_one_writer(place, kind, capsys):
    write_written("p")
    if kind.startswith("hf"):
        Path("hub").mkdir()
        Path("p").rename("hub/me--pics")
    if kind.startswith("imported"):
        import_dataset("p", "mine", load_config(place))
        shutil.rmtree("p")
    data = load(place, kind)
    capsys.readouterr()
    shards = dealt("natural:writer", data, clients=4, min_size=1)
    assert [sorted(shard) for shard in shards] == [rows_of(word) for word in ("ann", "bob", "eve", "zoe")]
    [line] = capsys.readouterr().err.splitlines()
    assert "1 of 12 training images go to no client (1 have no value)" in line


def load_config(place: Path):
    from mosaic_ray.config.schema import DataConfig

    return DataConfig(root=str(place))


def test_the_largest_values_have_a_client_of_equal_ones_the_first(place, capsys):
    write_written("p")
    data = load(place, "parquet:p")
    capsys.readouterr()
    two = dealt("natural:writer", data, clients=2, min_size=1)
    assert [sorted(shard) for shard in two] == [rows_of("ann"), rows_of("zoe")], "ann and bob have three images each"
    assert "(1 have no value, 2 values are left out)" in capsys.readouterr().err
    assert "4 values, fewer than partition.num_clients = 5" in refusal(
        "natural:writer", data=data, clients=5, min_size=1
    )
    assert "3 of 4 clients have partition.min_size = 3" in refusal("natural:writer", data=data, clients=4, min_size=3)


def test_whole_numbers_are_in_order_of_their_size(place):
    write_written("p", ["a"] * 12)
    shards = dealt("natural:number", load(place, "parquet:p"), clients=3, min_size=1)
    assert [sorted(shard) for shard in shards] == [[2, 5, 8, 11], [1, 4, 7, 10], [0, 3, 6, 9]], "8, 9, 10"


def test_images_that_are_left_out_take_their_values_with_them(place):
    write_written("p", bad=(1, 6, 8))
    data = load(place, "parquet:p", skip_bad=True)
    kept = [writer for row, writer in enumerate(WRITERS) if row not in (1, 6, 8)]
    shards = dealt("natural:writer", data, clients=3, min_size=1)
    assert [{kept[row] for row in shard} for shard in shards] == [{"ann"}, {"bob"}, {"zoe"}]


@pytest.mark.parametrize("bad", [(), (1, 6, 8)])
def test_samples_of_several_modalities_are_dealt_by_column_and_by_file(place, bad, capsys):
    write_written("p", bad=bad)
    for part in Path("p").glob("*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table.append_column("note", pa.array([f"row {n}" for n in range(len(table))])), part)
    data = load(place, "parquet:p", modalities=("img", "note"), text_length=8, skip_bad=bool(bad))
    kept = [writer for row, writer in enumerate(WRITERS) if row not in bad]
    capsys.readouterr()
    words = sorted({writer for writer in kept if writer})
    shards = dealt("natural:writer", data, clients=len(words), min_size=1)
    assert [sorted(shard) for shard in shards] == [[r for r, w in enumerate(kept) if w == word] for word in words]
    assert "1 of " in capsys.readouterr().err
    shards = dealt(write_rows("rows.csv", [(0, 2), (1, 0), (0, 1)]), data, clients=2, min_size=1)
    assert [sorted(shard) for shard in shards] == [[1, 2], [0]]
    assert 'no such column; did you mean "writer"' in refusal("natural:writers", data=data)
    assert "no such column" in refusal("natural:score", data=data)
    assert "row 12, and rows run from 0 to" in refusal(write_rows("far.csv", [(0, 12)]), data=data)
    Path("p/train-1.parquet").unlink()
    assert "cannot be read" in refusal("natural:writer", data=data)


@pytest.mark.parametrize("sampler", ["natural:writer", "file:rows.csv"])
def test_what_clients_hold_goes_with_any_sampler(place, sampler):
    write_written("p", [*"aabbcc"] * 2)
    for part in Path("p").glob("*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table.append_column("note", pa.array([f"row {n}" for n in range(len(table))])), part)
    write_rows("rows.csv", [(row // 2 % 3, row) for row in range(12)])
    words = ["--dataset", "parquet:p", "--sampler", sampler, "--clients", "3", "--json"]
    sets = ("data.modalities=[img,note]", "partition.modalities=[img,note]", "partition.min_size=1")
    result = ask("partition", *words, *(word for knob in sets for word in ("--set", knob)))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["modalities"] == [["img"], ["note"], ["img"]] and sum(map(sum, found["label_counts"])) == 12


def test_other_columns_are_refused(place, monkeypatch):
    write_written("p")
    data = load(place, "parquet:p")
    assert 'no such column; did you mean "writer"' in refusal("natural:writers", data=data)
    assert "no such column" in refusal("natural:score", data=data), "fractions name no client"
    assert "has no columns" in refusal("natural:writer")
    monkeypatch.setattr(groups_module, "MOST_VALUES", 2)
    assert "more than 2 values" in refusal("natural:writer", data=data)
    path = Path(data.copy, groups_module.COLUMNS)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "its checksum differs" in refusal("natural:writer", data=data)
    path.unlink()
    assert "cannot be read" in refusal("natural:writer", data=data)


def test_a_column_without_values_is_refused(place):
    write_written("p", [None] * 12)
    assert "has no values" in refusal("natural:writer", data=load(place, "parquet:p"))


def test_another_column_of_the_same_images_is_another_key(place):
    write_written("p")
    config = override(
        TINY, {"partition.sampler": "natural:writer", "partition.num_clients": 2, "partition.min_size": 1}
    )
    first = load(place, "parquet:p")
    before = partition_key(config, first)
    write_written("p", ["zoe", *WRITERS[:0:-1]])
    second = load(place, "parquet:p")
    assert second.identity == first.identity and partition_key(config, second) != before


def test_only_the_column_that_is_asked_for_is_read(place, monkeypatch):
    write_written("p")
    data, read = load(place, "parquet:p"), []
    genuine = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, columns: read.append((size, columns)) or genuine(self, size, columns=columns),
    )
    dealt("natural:writer", data, clients=4, min_size=1)
    assert read == [(1 << 16, ["writer"])]


# --- runs, tables, files ---------------------------------------------------------------------------------------------


@pytest.fixture
def stripes(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def test_a_run_shares_its_partition_with_another_path_of_the_same_content(place, stripes):
    knobs = {"partition.num_clients": 3, "method": "fedavg", "warmup.num_rounds": 1, "finetune.num_rounds": 0}
    found = []
    for name in ("one.csv", "two.csv"):
        config = override(TINY, knobs | {"partition.sampler": write_rows(name, ROWS[:90])})
        found.append(runner.run(config, storage=str(place / "store"), progress=False))
    assert [summary["stages"]["partition"]["cached"] for summary in found] == [False, True]
    assert found[0]["stages"]["partition"]["key"] == found[1]["stages"]["partition"]["key"]
    assert np.array(found[0]["label_counts"]).sum() == 90


@pytest.mark.ray
def test_clients_on_ray_have_the_same_images(place, stripes, ray_up):
    knobs = {"partition.num_clients": 3, "method": "fedavg", "warmup.num_rounds": 1, "finetune.num_rounds": 0}
    knobs["partition.sampler"] = write_rows("deal.csv", ROWS[:90])
    one, two = (
        runner.run(override(TINY, knobs | {"runtime.host": host}), storage=str(place / host), progress=False)
        for host in ("serial", "ray")
    )
    assert one["accuracy"] == two["accuracy"] and one["label_counts"] == two["label_counts"]
    assert one["stages"]["warmup"]["key"] == two["stages"]["warmup"]["key"]


def test_the_command_shows_the_table_and_the_heat_map(place, stripes):
    write_rows("my deal.csv", ROWS[:90])
    done = ask("partition", "--sampler", "file:my deal.csv", "--clients", "3")
    assert done.exit_code == 0, done.stderr
    [picture] = (place / "mosaic_runs" / "partitions").iterdir()
    assert "my_deal_csv" in picture.name and "90" in done.stdout
    assert done.stderr.count("\n") == 1 and "150 of 240 training images" in done.stderr
    found = ask("partition", "--sampler", "file:my deal.csv", "--clients", "3", "--json", "--omega", "7")
    assert json.loads(found.stdout)["client_sizes"] == [30, 30, 30], "omega does not apply, as with iid"
    refused = ask("partition", "--sampler", "file:my deal.csv")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1


# --- partitioners of flwr-datasets -----------------------------------------------------------------------------------


class InTurn:
    """As ``flwr_datasets.partitioner.Partitioner``: ``dataset``, ``num_partitions`` and ``load_partition``."""

    def __init__(self, num_partitions: int) -> None:
        self.num_partitions = num_partitions
        self.dataset: dict = {}

    def load_partition(self, partition_id: int) -> dict:
        return {name: column[partition_id :: self.num_partitions] for name, column in self.dataset.items()}


def test_a_partitioner_of_flwr_datasets_is_a_sampler(monkeypatch):
    fake = types.SimpleNamespace(Dataset=types.SimpleNamespace(from_dict=dict))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    labels, seen = labels_of([30, 30]), []
    deal = sampler_of(lambda clients, seed: seen.append((clients, seed)) or InTurn(clients))
    shards = deal(labels, np.array([30, 30]), PartitionConfig(num_clients=4), 9)
    assert [shard.tolist() for shard in shards] == [list(range(k, 60, 4)) for k in range(4)] and seen == [(4, 9)]


SAMPLER = """
from flwr_datasets.partitioner import DirichletPartitioner
from mosaic_ray.data.flwr import sampler_of

deal = sampler_of(
    lambda clients, seed: DirichletPartitioner(num_partitions=clients, partition_by="label", alpha=0.5, seed=seed)
)
"""


def test_the_real_partitioner_deals_every_row_once(place):
    pytest.importorskip("flwr_datasets")
    Path("flower.py").write_text(SAMPLER)
    shards = dealt("flower.py:deal", clients=4)
    assert sorted(np.concatenate(shards)) == list(range(240)) and len({*map(len, shards)}) > 1
    assert all(map(np.array_equal, shards, dealt("flower.py:deal", clients=4)))


def test_groups_differ_in_their_digest():
    one = Groups(np.array([0, 1]), np.array([0, 1]))
    assert one.digest == Groups(np.array([0, 1], np.int32), np.array([0, 1])).digest
    assert (
        one.digest != Groups(np.array([0, 1]), np.array([1, 0])).digest != Groups(np.array([0]), np.array([1])).digest
    )
