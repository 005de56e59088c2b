"""Three machines, as namespaces: what happens on one of them, and what is told on the others.

Each node reads its own files. Where a run must go on after a loss, the nodes share its folder.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from falcon_qlora.common import by_url
from tests.cluster.nodes import Nodes, why_not
from tests.folder_store import objects
from tests.integration.interrupted import ROWS, SMALL, assert_same_run
from tests.integration.runs import metrics, summary, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SETTINGS = (
    f"{SMALL} -q 4bit --max_length 64 -b 2 --lora_r 8 --save_steps 2 --logging_steps 1 --learning_rate 1e-3 "
    "--report_to none --dataset_name rows.jsonl --resume auto"
).split()
GONE = "has not responded: ended, stopped, or cut off from the network"
NOT_THERE = "not started, ended, or cut off from the network"
Ended = dict[int, tuple[int, str, str]]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with Nodes(tmp_path_factory.mktemp("nodes")) as machines:
        yield machines


@pytest.fixture
def nodes(machines: Nodes) -> Iterator[Nodes]:
    """Nodes on which nothing runs, each with the same rows and no run."""
    machines.clear()
    for node in (1, 2, 3):
        write_jsonl(machines.at(node) / "rows.jsonl", ROWS)
    yield machines
    for node in (1, 2, 3):
        machines.cut(node, off=False)
        machines.kill(node)


def begun(
    nodes: Nodes, *words: str, steps: str = "6", run: str = "run", **own: list[str]
) -> dict[int, subprocess.Popen[str]]:
    """Start the run on two nodes.

    Args:
        run: its folder; a relative one is another on each node.
        own: words of one node, by its name.
    """
    common = ["--nnodes", "2", *SETTINGS, "--steps", steps, "--output_dir", run, *words]
    return {node: nodes.train(node, *common, *own.get(f"node{node}", [])) for node in (1, 2)}


def ended(processes: dict[int, subprocess.Popen[str]], within_s: float = 180) -> Ended:
    """Exit status, stdout and stderr on each node."""
    deadline, result = time.monotonic() + within_s, {}
    for node, process in processes.items():
        output, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        result[node] = process.returncode, output, errors
    return result


def at_step(process: subprocess.Popen[str], step: int) -> None:
    """Wait until a run tells of this step, or a later one."""
    assert process.stdout is not None
    told = (re.match(r"step (\d+)/", line) for line in process.stdout)
    assert any(found is not None and int(found[1]) >= step for found in told)


def start_with(process: subprocess.Popen[str], ranks: int) -> str:
    """Wait until a run has begun, or gone on, with so many ranks; what it tells of its steps."""
    assert process.stdout is not None
    assert any(f" devices    CPU, {ranks} process" in line for line in process.stdout)
    return next(line for line in process.stdout if line.startswith("  steps "))


def errors_of(ends: Ended) -> list[str]:
    """What was told, the same on each node."""
    told = {errors for _, _, errors in ends.values()}
    assert len(told) == 1, ends
    return told.pop().splitlines()


def test_two_nodes_are_two_processes_of_one(nodes: Nodes) -> None:
    for node, (status, _, errors) in ended(begun(nodes)).items():
        assert (node, status, errors) == (node, 0, "")
    one = nodes.start(
        3, "falcon_qlora", "train", *SETTINGS, "--steps", "6", "--output_dir", "run", "--gpus", "2"
    )
    assert one.wait(timeout=180) == 0
    assert_same_run(nodes.at(1) / "run", nodes.at(3) / "run")
    assert not (nodes.at(2) / "run").exists()
    assert 0 < summary(nodes.at(1) / "run")["network_share"] < 1
    assert summary(nodes.at(3) / "run")["network_share"] is None


def test_ranks_that_are_not_alike_do_not_train(nodes: Nodes) -> None:
    write_jsonl(nodes.at(2) / "rows.jsonl", ROWS[:50])
    ends = ended(begun(nodes, node2=["--learning_rate", "3e-4"]))
    first, data, rate = errors_of(ends)
    assert [status for status, _, _ in ends.values()] == [2, 2]
    assert first == "error: the ranks are not alike, so nothing was trained. Give all of them the same:"
    assert re.fullmatch(r"  data: \d+ documents, \w+ on node1, \d+ documents, \w+ on node2", data)
    assert rate == "  --learning_rate: 0.001 on node1, 0.0003 on node2"
    assert not (nodes.at(1) / "run/config.yaml").exists()


def test_a_file_altered_at_equal_size_is_seen(nodes: Nodes) -> None:
    rows = [dict(row) for row in ROWS]
    rows[7]["output"] = rows[7]["output"].replace("1", "7", 1)
    altered = write_jsonl(nodes.at(2) / "rows.jsonl", rows)
    assert altered.stat().st_size == (nodes.at(1) / "rows.jsonl").stat().st_size
    _, data = errors_of(ended(begun(nodes)))
    assert data.startswith("  data: ")


@pytest.mark.parametrize("node", [1, 2])
def test_an_error_on_one_node_ends_both_soon(nodes: Nodes, node: int) -> None:
    (nodes.at(node) / "rows.jsonl").unlink()
    began = time.monotonic()
    ends = ended(begun(nodes))
    assert time.monotonic() - began < 30
    assert errors_of(ends) == [f"error: node{node}: file not found: rows.jsonl"]
    assert [status for status, _, _ in ends.values()] == [2, 2]
    assert nodes.none_left()


@pytest.mark.parametrize(("lost", "rank"), [(1, 0), (2, 1)])
def test_a_lost_node_is_named(nodes: Nodes, lost: int, rank: int) -> None:
    processes = begun(nodes, steps="400")
    at_step(processes[1], 3)
    nodes.kill(lost)
    status, _, errors = ended(processes)[3 - lost]
    first, *rest = errors.splitlines()
    assert (status, first) == (1, f"error: rank {rank} on node{lost} {GONE}")
    assert [line.split(" is ")[0] for line in rest] == ["the last complete checkpoint"] * (lost == 2)
    assert nodes.none_left()


@pytest.mark.parametrize(("lost", "rank"), [(1, 0), (2, 1)])
def test_a_node_that_is_lost_before_the_first_step_is_named_soon(nodes: Nodes, lost: int, rank: int) -> None:
    for node in (1, 2):
        write_jsonl(nodes.at(node) / "rows.jsonl", ROWS * 300)
    processes = begun(nodes, "--cache_dir", "cache")
    assert processes[1].stdout is not None
    assert any(line.startswith("reading rows") for line in processes[1].stdout)
    nodes.kill(lost)
    began = time.monotonic()
    status, _, errors = ended({3 - lost: processes[3 - lost]})[3 - lost]
    assert time.monotonic() - began < 30
    told = [f"error: rank {rank} on node{lost} {GONE}\n"]
    if lost == 1:  # which its agent may see first
        told.append(f"error: node2: the other nodes do not answer at node1:29400 (connection): {NOT_THERE}\n")
    assert status == 1
    assert errors in told
    assert nodes.none_left()


@pytest.mark.parametrize("node", [1, 2])
def test_a_rank_that_dies_before_the_ranks_have_met_ends_both_soon(nodes: Nodes, node: int) -> None:
    words = ["--nnodes", "2", *SETTINGS, "--steps", "6", "--output_dir", "run"]
    module = "tests.cluster.dies_early"
    dies = {node: "1", 3 - node: ""}
    began = time.monotonic()
    ends = ended({each: nodes.train(each, *words, module=module, DIES=dies[each]) for each in (1, 2)})
    assert time.monotonic() - began < 60  # with the libraries, on a busy machine
    assert errors_of(ends) == [
        f"error: rank {node - 1} on node{node} was killed by SIGKILL; out of CPU memory?"
    ]
    assert [status for status, _, _ in ends.values()] == [1, 1]
    assert nodes.none_left()


def test_a_node_that_is_cut_off_ends_both_within_the_hang_limit(nodes: Nodes) -> None:
    processes = begun(nodes, "--hang_minutes", "0.2", steps="400")
    at_step(processes[1], 3)
    nodes.cut(2)
    ends = ended(processes, within_s=150)
    told = [errors.splitlines()[0] for _, _, errors in ends.values()]
    assert told[0].startswith("error: rank 1 on node2 is not responding: stopped, ")
    assert told[1] == f"error: rank 0 on node1 {GONE}"
    assert nodes.none_left()


def test_a_link_that_is_cut_for_a_while_is_survived(nodes: Nodes) -> None:
    processes = begun(nodes, steps="20")
    at_step(processes[1], 3)
    nodes.cut(2)
    time.sleep(6)
    nodes.cut(2, off=False)
    assert [(status, errors) for status, _, errors in ended(processes).values()] == [(0, ""), (0, "")]


def test_word_of_a_save_is_left_without_noise_when_the_link_is_back(nodes: Nodes) -> None:
    def rank(index: int) -> subprocess.Popen[str]:
        place = {"MASTER_ADDR": "node1", "MASTER_PORT": "29555", "WORLD_SIZE": "2", "RANK": str(index)}
        return nodes.start(index + 1, "tests.cluster.leaves_word", **place)

    processes = {1: rank(0)}
    assert processes[1].stdout is not None
    assert processes[1].stdout.readline() == "ready\n"
    nodes.cut(2)
    processes[2] = rank(1)
    time.sleep(12)  # in which torch is imported, and the network says that there is no way
    assert processes[2].poll() is None
    nodes.cut(2, off=False)
    words = "['of rank 0', 'of rank 1']\n"
    assert ended(processes) == {1: (0, words, ""), 2: (0, "", "")}


@pytest.mark.parametrize("asked", [1, 2])
def test_a_signal_to_one_node_stops_and_saves_both_and_the_same_command_goes_on(
    nodes: Nodes, asked: int
) -> None:
    run = str(nodes.folder / f"shared-{asked}")
    processes = begun(nodes, steps="400", run=run)
    at_step(processes[1], 3)
    processes[asked].terminate()
    ends = ended(processes)
    assert [(status, errors) for status, _, errors in ends.values()] == [(75, ""), (75, "")]
    told = re.search(r"stopped at step (\d+) of 400\. Go on with, on every node:  (.*)", ends[1][1])
    assert told is not None
    assert told[2].startswith(f"falcon-qlora train --config {run}/config.yaml --resume {run} --rdzv_backend")
    assert "--nnodes 2" in told[2]
    last = int(told[1]) + 2
    ends = ended(begun(nodes, steps=str(last), run=run))
    assert [(status, errors) for status, _, errors in ends.values()] == [(0, ""), (0, "")]
    assert f"going on from step {told[1]}" in ends[1][1]
    assert [line["step"] for line in metrics(Path(run))] == list(range(1, last + 1))


def test_a_node_that_does_not_come_is_told(nodes: Nodes) -> None:
    processes = begun(nodes, "--rdzv_conf", "join_timeout=3,last_call_timeout=1", node2=["--help"])
    status, _, errors = ended(processes)[1]
    told = "error: node1: the other nodes do not answer at node1:29400 (timeout): not started, ended, or "
    assert (status, errors) == (1, f"{told}cut off from the network\n")


def test_two_tasks_of_srun_are_one_run(nodes: Nodes) -> None:
    def tasks(run: str) -> dict[int, subprocess.Popen[str]]:
        of_job = {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "0",
        }
        of_job |= {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
        words = [*SETTINGS, "--steps", "400", "--output_dir", run]
        return {
            node: nodes.start(
                *(node, "falcon_qlora.train", *words),
                **of_job,
                SLURM_PROCID=str(node - 1),
                SLURM_NODEID=str(node - 1),
            )
            for node in (1, 2)
        }

    run, stopped = str(nodes.folder / "srun"), [0]
    for _ in range(2):
        processes = tasks(run)
        at_step(processes[1], stopped[-1] + 3)
        processes[2].terminate()
        ends = ended(processes)
        assert [(status, errors) for status, _, errors in ends.values()] == [(75, ""), (75, "")]
        told = re.search(
            r"stopped at step (\d+) of 400\. Go on with, on every node:  srun --ntasks 2 ", ends[1][1]
        )
        assert told is not None
        stopped.append(int(told[1]))
    # What was done before the first stop was not done again.
    assert [line["step"] for line in metrics(Path(run))] == list(range(1, stopped[-1] + 1))


def test_a_signal_before_there_is_anything_to_save_ends_both(nodes: Nodes) -> None:
    for node in (1, 2):
        write_jsonl(nodes.at(node) / "rows.jsonl", ROWS * 300)
    processes = begun(nodes, "--cache_dir", "cache")
    assert processes[1].stdout is not None
    assert any(line.startswith("reading rows") for line in processes[1].stdout)
    processes[2].terminate()
    ends = ended(processes)
    assert errors_of(ends) == ["error: ended by SIGTERM on node2"]
    assert [status for status, _, _ in ends.values()] == [1, 143]


def test_a_checkpoint_that_only_one_node_sees_is_refused_on_both(nodes: Nodes) -> None:
    assert [status for status, _, _ in ended(begun(nodes, steps="2")).values()] == [0, 0]
    (told,) = errors_of(ended(begun(nodes, steps="4")))
    assert re.match(r"error: .*run/checkpoints/step-2 is not on node2, and each node reads it", told)


def test_a_run_by_url_goes_on_on_other_nodes(nodes: Nodes) -> None:
    store = nodes.folder / "store"
    store.mkdir()

    def tried(steps: int) -> Ended:
        words = ["--nnodes", "2", *SETTINGS, "--steps", str(steps), "--output_dir", "s3://bucket/run"]
        more = {"module": "tests.integration.with_store", "STORE": str(store)}
        # Rank 1 comes to the end when rank 0, which has the ranks' store, is done.
        return ended({1: nodes.train(1, *words, **more), 2: nodes.train(2, *words, **more, LATE="2")})

    assert [(status, errors) for status, _, errors in tried(4).values()] == [(0, ""), (0, "")]
    run = next((nodes.folder / "home1/.cache/falcon_qlora/runs").iterdir())
    run.rename(nodes.folder / "first")  # the second start finds new machines
    ends = tried(6)
    assert [(status, errors) for status, _, errors in ends.values()] == [(0, ""), (0, "")]
    assert "going on from step 4" in ends[1][1]
    assert [line["step"] for line in metrics(run)] == list(range(1, 7))
    assert by_url.steps_at({name.removeprefix("bucket/run/"): 0 for name in objects(store)}) == [4, 6]


def test_a_node_that_is_lost_comes_back(nodes: Nodes) -> None:
    run = str(nodes.folder / "elastic")
    quick = "last_call_timeout=2,keep_alive_interval=2"
    words = ["--nnodes", "1:2", "--max_restarts", "3", "--rdzv_id", "job", "--rdzv_conf", quick, *SETTINGS]
    words += ["--steps", "4000", "--output_dir", run]
    processes = {node: nodes.train(node, *words) for node in (1, 2)}
    began = start_with(processes[1], 2)  # on a busy machine node1 may have begun alone
    batch = re.search(r"\d+ × 64 tokens a step", began)
    assert batch is not None
    at_step(processes[1], 3)
    nodes.kill(2)
    alone = start_with(processes[1], 1)
    processes[2].wait()
    processes[2] = nodes.train(2, *words)
    together = start_with(processes[1], 2)
    for steps in (alone, together):
        assert batch[0] in steps
        assert "going on from step" in steps
    at_step(processes[1], 1)
    processes[2].terminate()
    ends = ended(processes)
    assert [status for status, _, _ in ends.values()] == [75, 75], ends
    steps = [line["step"] for line in metrics(Path(run))]
    assert steps == list(range(1, len(steps) + 1))
