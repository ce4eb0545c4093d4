"""Several processes that train together: what they share, how they wait for each other, and how they end.

The trials themselves are in tests/helpers/rank_trials.py, and run in two processes, once for this whole file.
"""

import json
import os
import pathlib
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from running import ROOT, digits, tool_environment

from fixmatch import channel, checkpoint
from fixmatch.channel import Channel, RankLost
from parity import launch


def start(folder: pathlib.Path, wait: float) -> list[subprocess.Popen]:
    """Both ranks of rank_trials, joined without a launcher's help; what they print is in FOLDER/output-RANK.txt."""
    processes = []
    for rank, environment in enumerate(launch._environments()):
        environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests/helpers")
        with open(folder / f"output-{rank}.txt", "w", encoding="utf-8") as output:
            processes.append(subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "rank_trials", folder], stdout=output, stderr=output,
                env={**environment, "RANK_TRIALS_WAIT": str(wait)}))
    return processes


def finish(folder: pathlib.Path, processes: list[subprocess.Popen], timeout: float) -> list[dict]:
    try:
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [(folder / f"output-{rank}.txt").read_text() for rank in (0, 1)]
    # the last trial kills rank 1, which ends rank 0
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL], "\n".join(said)
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    found[0]["output"] = said[0].splitlines()
    found[0]["log"] = (folder / "rank-0/dead/train.log").read_text().splitlines()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What both ranks found, {trial: ...} of each."""
    folder = tmp_path_factory.mktemp("ranks")
    return finish(folder, start(folder, wait=0.5), timeout=240)


# --- what they share


@pytest.mark.parametrize("strong", ["reference", "ctaugment"])
def test_a_resumed_run_is_step_by_step_the_one_never_stopped(found, strong):
    """Rank 1 alone got the signal, and has no run folder that it could resume from."""
    for rank in (0, 1):
        trial = found[rank][strong]
        assert trial["whole"][:2] == trial["resumed"][:2] == ["", ""]
        assert trial["stopped"][0] == "Interrupted"
        assert "after step 3" in trial["stopped"][1]
        assert trial["whole"][2] == trial["resumed"][2] != trial["stopped"][2]
        assert trial["whole"][2] == found[0][strong]["whole"][2]
    whole, broken = found[0][strong]["logs"]
    assert [line["step"] for line in whole] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert broken == whole
    assert found[0][strong]["differing"] == []


@pytest.mark.long
@pytest.mark.parametrize("settings", [
    ("ssl.policy=flexmatch", "ssl.threshold=0.3"), ("ssl.policy=softmatch", "ssl.align=uniform"),
    ("augment.strong=ctaugment",)], ids=["flexmatch", "softmatch", "ctaugment"])
def test_both_ranks_killed_at_random_again_and_again_end_as_those_that_never_were(tmp_path, settings):
    """SIGKILL of both, as a machine that loses its power does it."""
    rng, steps, kills = random.Random(0), 60, 4

    def train(name: str) -> list[subprocess.Popen]:
        arguments = digits(f"run.dir={tmp_path / name}", f"train.total_steps={steps}", "train.eval_every=5", *settings)
        return [subprocess.Popen([sys.executable, "-W", "ignore", ROOT / "tools/train.py", *map(str, arguments),
                                  "--resume"], env=environment, stdout=subprocess.DEVNULL)
                for environment in launch._environments()]

    def end(processes) -> list[int]:
        return [process.wait(timeout=240) for process in processes]

    assert end(train("whole")) == [0, 0]
    done = []
    for _ in range(kills):
        processes, before = train("killed"), done
        while done == before and processes[0].poll() is None:  # until it has gone further than the one before
            time.sleep(0.01)
            done = sorted(file.stat().st_mtime_ns for file in tmp_path.glob("killed/checkpoints/latest/*.json"))
        time.sleep(rng.uniform(0, 0.3))
        for process in processes:
            process.kill()
        assert -signal.SIGKILL in end(processes)
    assert end(train("killed")) == [0, 0]
    whole, killed = (checkpoint.load(tmp_path / name / "checkpoints/latest") for name in ("whole", "killed"))
    assert whole.arrays.keys() == killed.arrays.keys()
    assert [name for name, array in whole.arrays.items() if not np.array_equal(array, killed.arrays[name])] == []
    assert whole.manifest.history == killed.manifest.history


def test_the_shared_evaluation_is_that_of_one_process_bit_for_bit(found):
    last = found[0]["reference"]["logs"][0][-1]
    alone = found[0]["alone"]
    assert {kind: last[kind] for kind in ("raw", "ema")} == {
        kind: {metric: alone[kind][metric] for metric in last[kind]} for kind in ("raw", "ema")}
    assert found[0]["shares"] == found[1]["shares"] == [True] * 6


def test_ranks_that_differ_are_refused_with_what_differs(found):
    named = {"learning rate": "optim.lr: 0.03 on rank 0, 0.04 on rank 1", "pixels": "the images and labels: ",
             "classes": "the classes: ", "--resume": "--resume: False on rank 0, True on rank 1",
             "weights": "weights and momentum: "}
    for rank in (0, 1):
        for name, what in named.items():
            kind, said, _, _ = found[rank]["refusals"][name]
            assert (kind, what in said, "\n" in said) == ("ConfigError", True, False), said
    assert found[0]["refusals"]["left behind"] is False


# --- how they wait, and how they end


def test_the_others_wait_for_rank_0(found):
    for rank in (0, 1):
        kind, _, _, seconds = found[rank]["waiting"]
        assert kind == ""
        assert seconds > 5 * 0.5  # reading, preparing, two evaluations, two checkpoints


@pytest.mark.long
def test_they_wait_longer_than_gloo_would(tmp_path):
    for ranks in finish(tmp_path, start(tmp_path, wait=45), timeout=900):
        kind, said, _, seconds = ranks["waiting"]
        assert (kind, said) == ("", "")
        assert seconds > 5 * 45


def test_a_loss_that_is_no_number_on_rank_1_ends_all_with_its_step_and_the_checkpoint(found):
    for rank in (0, 1):
        kind, said, _, seconds = found[rank]["not a number"]
        assert kind == "NonFinite"
        assert re.fullmatch(r"loss_x is nan at step 4 on rank 1; \S+/latest is from step 2; .*", said)
        assert seconds < 20  # no time-out


def test_a_failure_on_one_rank_ends_the_others_with_its_message(found):
    (own, there), (other, here) = found[0]["failing"], found[1]["failing"]
    assert own[:2] == ["OSError", "[Errno 28] No space left on device: 'there'"]
    assert other[:2] == ["RankLost", f"rank 0 failed: OSError: {own[1]}"]
    assert here[:2] == ["ZeroDivisionError", "of rank 1"]
    assert there[:2] == ["RankLost", "rank 1 failed: ZeroDivisionError: of rank 1"]


def test_a_killed_rank_is_named_by_the_others_last_line(found):
    """Rank 0 was in the backward pass, where Paddle would end it by SIGABRT."""
    said = r"rank 1 on 127\.0\.0\.1 has died: .*; --resume goes on from the last checkpoint"
    assert re.fullmatch(f"error: {said}", found[0]["output"][-1])
    assert re.fullmatch(f"stopped: {said}", found[0]["log"][-1])
    assert "death" not in found[1]


# --- the channel, between threads of this process


@pytest.fixture
def channels():
    """channels(3) are those of three ranks, joined."""
    made = []

    def join(ranks: int, **options) -> list[Channel]:
        published, found = [], {}

        def connect(rank):
            while not published:
                time.sleep(0.001)
            found[rank] = channel.connect(rank, published[0], **options)

        others = [threading.Thread(target=connect, args=(rank,)) for rank in range(1, ranks)]
        for thread in others:
            thread.start()
        found[0] = channel.host("127.0.0.1", ranks, published.append, **options)
        for thread in others:
            thread.join()
        made.extend(found.values())
        return [found[rank] for rank in range(ranks)]

    yield join
    close(made)


def close(joined: list[Channel]) -> None:
    """All, and waits until they have let go of their connections."""
    for one in joined:
        one.close()
    deadline = time.monotonic() + 5
    while any(connection.fileno() >= 0 for one in joined for connection in one.peers.values()):
        assert time.monotonic() < deadline, "a connection stays open"
        time.sleep(0.001)


def on_all(joined: list[Channel], call) -> list:
    """call(channel) on all at once: what each gave or raised."""
    results = [None] * len(joined)

    def run(index):
        try:
            results[index] = call(joined[index])
        except RankLost as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(joined))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return results


def test_all_hear_the_same_in_the_order_of_ranks(channels):
    joined = channels(3)
    for round_ in range(50):
        heard = on_all(joined, lambda c, n=round_: c.exchange([c.rank, n]))
        assert heard == [[[0, round_], [1, round_], [2, round_]]] * 3
    close(joined)
    assert [one.failure for one in joined] == [None] * 3  # who said goodbye has not died


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_all_others_hear_of_a_rank_whose_connection_closes(channels, dead):
    joined = channels(3)
    joined[dead]._left |= joined[dead].peers.keys()  # the dead notice nothing, and tell nobody
    for connection in joined[dead].peers.values():
        connection.shutdown(socket.SHUT_RDWR)  # as the system does for a process that was killed
    left = [one for one in joined if one.rank != dead]
    assert all(f"rank {dead} on 127.0.0.1 has died" in said for said in on_all(left, lambda c: c.exchange(None)))


def test_a_rank_that_is_gone_before_anybody_listens_to_it_is_missed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = socket.create_connection(server.getsockname())
        connection = server.accept()[0]
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets the connection
    gone.close()
    left = Channel(0, {1: connection})
    with pytest.raises(RankLost, match="rank 1 has died: killed"):
        left.exchange(None)
    close([left])


def test_the_first_failure_is_everyones(channels):
    joined = channels(3)
    joined[2].report("NonFinite", "loss is nan")
    joined[0].report("OSError", "later")
    expected = {"rank": 2, "kind": "NonFinite", "message": "loss is nan"}
    assert [one.wait_for_failure(5) for one in joined] == [expected] * 3


def test_a_rank_that_hangs_is_ended_after_another_one_died(channels, monkeypatch):
    """Its main thread is in a collective that never returns, as NCCL's."""
    monkeypatch.setattr(channel, "PATIENCE", 0.2)
    ended = threading.Event()


    def on_stuck(failure):
        if "rank 1" in failure["message"]:  # what rank 0 says; both are in this process
            ended.set()

    _, dies = channels(2, on_stuck=on_stuck)
    dies.peers[0].shutdown(socket.SHUT_RDWR)
    assert ended.wait(5)
    ended.clear()
    awake, dies = channels(2, on_stuck=on_stuck)
    dies.peers[0].shutdown(socket.SHUT_RDWR)
    assert "has died" in on_all([awake], lambda c: c.exchange(None))[0]
    assert not ended.wait(0.5)


HANGS = """
import signal, threading, time
from fixmatch import channel
channel.PATIENCE = 1.0
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.1, channel.end_process, ["rank 1 has died", 4]).start()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("tidied up", flush=True)
    time.sleep(60)
"""


def test_a_process_that_hangs_may_tidy_up_and_then_ends_with_one_line_and_the_code():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HANGS], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (4, "tidied up\n", "error: rank 1 has died\n")


def test_a_stranger_is_not_let_in():
    published, joined = [], []
    waiting = threading.Thread(target=lambda: joined.append(channel.host("127.0.0.1", 2, published.append)))
    waiting.start()
    while not published:
        time.sleep(0.001)
    address, port, _ = json.loads(published[0])
    for line in (b'{"rank": 1, "secret": "guessed"}\n', b"GET / HTTP/1.1\n", b"[]\n", b"x" * 5000, b""):
        with socket.create_connection((address, port)) as stranger:
            stranger.sendall(line)
    right = channel.connect(1, published[0])
    waiting.join(10)
    assert on_all([joined[0], right], lambda c: c.exchange(c.rank)) == [[0, 1], [0, 1]]
    close([joined[0], right])


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(channel, "TO_JOIN", 0.1)
    with pytest.raises(RankLost, match=r"rank 1 has not connected to rank 0 on 127\.0\.0\.1"):
        channel.host("127.0.0.1", 3, lambda _: None)


# --- under Paddle's launcher


@pytest.mark.long
def test_two_machines_without_a_common_disk_end_as_one(tmp_path):
    """Two launchers on addresses of this machine: rank 0's alone has a run folder; both end with exit code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{free.getsockname()[1]}"
    launchers = []
    for node, host in (("one", "127.0.0.1"), ("other", "127.0.0.2")):
        (tmp_path / node).mkdir()
        command = [sys.executable, "-m", "paddle.distributed.launch", "--nnodes", "2", "--master", master, "--host",
                   host, "--log_dir", "log", ROOT / "tools/train.py",
                   *digits("train.total_steps=3", "train.eval_every=2", "run.dir=run")]
        launchers.append(subprocess.Popen([str(part) for part in command], cwd=tmp_path / node, env=tool_environment(),
                                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        said = [launcher.communicate(timeout=180)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # and with it its rank
            launcher.wait(30)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(said)
    results = list(tmp_path.glob("*/run/result.json"))
    assert len(results) == 1
    assert json.loads(results[0].read_text())["world_size"] == 2
