"""A part of the store for every start, whatever earlier ones left in it; ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_sdar.parallel.rendezvous import own_store

SIZE = 4
TIMEOUT = timedelta(seconds=20)


def start(
    store: dist.Store, value: str, before: Callable[[int], None] = lambda rank: None
) -> list[str]:
    """What each rank finds under a key that rank 0 writes in its own part."""
    found = [""] * SIZE

    def rank(number: int) -> None:
        before(number)
        own = own_store(store, number, SIZE, TIMEOUT)
        if number == 0:
            own.set("key", value)
        else:
            own.wait(["key"], TIMEOUT)
        found[number] = own.get("key").decode()
        own.set(f"done/{number}", "")
        own.wait([f"done/{other}" for other in range(SIZE)], TIMEOUT)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_starts_one_after_another_do_not_see_each_other() -> None:
    store = dist.HashStore()
    for value in ("first", "second", "third"):
        assert start(store, value) == [value] * SIZE


@pytest.mark.parametrize("first", [0, 3])
def test_what_a_start_that_died_left_behind_is_no_answer(first: int) -> None:
    """Its ranks asked, were answered or came; this time rank 0 is the last or the first."""
    store = dist.HashStore()

    def rank_0_of_a_start_whose_ranks_2_and_3_never_came() -> None:
        with pytest.raises(RuntimeError, match="did not come"):
            own_store(store, 0, SIZE, timedelta(seconds=1))

    gone = threading.Thread(target=rank_0_of_a_start_whose_ranks_2_and_3_never_came)
    gone.start()
    own_store(store, 1, SIZE, TIMEOUT)
    gone.join()
    store.set("start/asks/2", "asked by one that is gone")
    turn = threading.Event()

    def in_order(rank: int) -> None:
        if rank == first:
            turn.set()
        turn.wait(20)

    assert start(store, "value", in_order) == ["value"] * SIZE


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2, 3\] did not come in time"):
        own_store(store, 0, SIZE, timedelta(seconds=0.2))
