"""Two hosts, as network namespaces joined by a virtual cable that is cut and mended.

Each runs configs/cluster/torchrun_multi_node.sh as a user would. Needs root.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed.command import ROOT
from distributed.test_restarts import log, settings, shards
from distributed.torchrun import TorchRun

from megatron_sdar.data.demo import make_demo_data

STEPS, TIMEOUT = 40, 12
ADDRESSES = ("10.99.7.1", "10.99.7.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cable:
    """The hosts; `cut` and `mend` are for both ends at once."""

    def __init__(self) -> None:
        self.hosts = [f"sdar{os.getpid()}-{number}" for number in range(2)]
        self.ends = [f"sdar{number}" for number in range(2)]
        for host in self.hosts:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        first, second = self.ends
        peer = ("peer", "name", second, "netns", self.hosts[1])
        ip("link", "add", first, "netns", self.hosts[0], "type", "veth", *peer)
        for host, end, address in zip(self.hosts, self.ends, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", end)
        self.mend()

    def mend(self) -> None:
        for host, end in zip(self.hosts, self.ends, strict=True):
            ip("-n", host, "link", "set", end, "up")

    def cut(self) -> None:
        ip("-n", self.hosts[0], "link", "set", self.ends[0], "down")

    def remove(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


@pytest.fixture
def cable() -> Iterator[Cable]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        made = Cable()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    yield made
    made.remove()


class Node:
    """The cluster script on one of the hosts."""

    def __init__(self, cable: Cable, number: int, config: Path) -> None:
        self._text = config.with_suffix(f".node{number}.txt")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        script = ROOT / "configs/cluster/torchrun_multi_node.sh"
        with self._text.open("w") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", cable.hosts[number], "bash", str(script), str(config)],
                cwd=ROOT,
                env={
                    **os.environ,
                    "PATH": path,
                    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
                    "HEAD_NODE": ADDRESSES[0],
                    "NUM_NODES": "2",
                    "NPROC_PER_NODE": "1",
                    "RUN_ID": "two-hosts",
                    "RELAUNCH_DELAY": "3",
                    "GLOO_SOCKET_IFNAME": cable.ends[number],
                    # Both have the same name here, so torchrun cannot tell whose address it is.
                    "TORCHRUN_ARGS": f"--local-addr {ADDRESSES[number]} "
                    f"--rdzv-conf is_host={1 - number}",
                },
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self._text.read_text()

    def wait_for(self, pattern: str, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while re.search(pattern, self.text) is None:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text}"
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def test_a_cut_link_ends_both_sides_and_a_mended_one_goes_on(tmp_path: Path, cable: Cable) -> None:
    make_demo_data(tmp_path, 120)
    keys = settings(
        tmp_path, fp64=False, max_steps=STEPS, save_steps=5, eval_steps=20, save_total_limit=3,
        logging_steps=5,
    )  # fmt: skip
    whole = TorchRun(2, keys, tmp_path / "whole")
    assert whole.end() == 0, whole.text
    output, config = tmp_path / "cut", tmp_path / "cut.yaml"
    written = (tmp_path / "whole.yaml").read_text()
    limit = f"ddp_timeout: {TIMEOUT}\n"
    config.write_text(limit + written.replace(str(tmp_path / "whole"), str(output)))
    nodes = [Node(cable, number, config) for number in range(2)]
    try:
        nodes[0].wait_for(r"saved \S+/checkpoint-10 ")
        cable.cut()
        cut = time.monotonic()
        for number, node in enumerate(nodes):
            node.wait_for(r"(?m)^(rank \d: )?error: ")
            print(f"host {number} gave up {time.monotonic() - cut:.1f} s after the cut")
        nodes[0].wait_for("torchrun ended with exit code 1; relaunch 1 of 10")
        assert "missing: rank 1 is silent" in nodes[0].text
        assert f"step {STEPS}/" not in nodes[0].text
        cable.mend()
        mended = time.monotonic()
        nodes[0].wait_for(rf"resumed from {output}/checkpoint-\d+", 200)
        print(f"resumed {time.monotonic() - mended:.1f} s after the link was back")
        assert [node.process.wait(120) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert shards(output, STEPS) == shards(tmp_path / "whole", STEPS)
    assert log(output) == log(tmp_path / "whole")
