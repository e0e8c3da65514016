"""Refusing devices and backends that cannot serve, before any process group exists."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from megatron_sdar.parallel.devices import check_launch, device_type
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import LaunchInfo, build_mesh

ALONE = LaunchInfo(rank=0, local_rank=0, world_size=1)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        pytest.raises(ValueError, match="device: cuda, but torch finds no GPU"),
    ):
        device_type("cuda")


def test_auto_takes_a_gpu_only_when_there_is_one() -> None:
    for available, expected in ((True, "cuda"), (False, "cpu")):
        with mock.patch.object(torch.cuda, "is_available", return_value=available):
            assert device_type("auto") == expected
            assert device_type("cpu") == "cpu"


@pytest.mark.parametrize(("device", "backend"), [("cpu", "nccl"), ("cuda", "gloo")])
def test_a_backend_of_the_other_device_is_refused(device: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"ddp_backend: {backend} does not serve device {device}"):
        check_launch(ALONE, device, backend)


def test_more_local_ranks_than_gpus_are_refused() -> None:
    with mock.patch.object(torch.cuda, "device_count", return_value=2):
        check_launch(LaunchInfo(1, 1, 4), "cuda", None)
        with pytest.raises(ValueError, match="local rank 2 has no GPU: this host has 2"):
            check_launch(LaunchInfo(2, 2, 4), "cuda", "nccl")


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("error", [ValueError("bad file"), OSError("bad file")])
def test_run_on_main_gives_the_result_or_the_error(error: Exception) -> None:
    mesh = build_mesh(torch.device("cpu"), 1, 1)
    assert run_on_main(lambda: {"answer": 42}, mesh) == {"answer": 42}

    def fail() -> Callable[[], None]:
        raise error

    with pytest.raises(ValueError, match="bad file"):
        run_on_main(fail, mesh)
