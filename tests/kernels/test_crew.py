"""How many threads a call in C gets, after calls that had to wait."""

import torch

from polyak.kernels.native import work


def test_as_many_as_there_is_work_for(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    sizes = [work.Crew().size(count) for count in (1, 32767, 32768, 65536, 98304, 10**9)]
    assert sizes == [1, 1, 2, 3, 4, 4]


def alone_after_a_wait(found):
    """How many calls are made alone after one that had to wait."""
    assert found.size(1 << 20) == 2
    found.took(8_000_000, 1 << 20)
    calls = 0
    while found.size(1 << 20) == 1:
        calls += 1
    return calls


def test_alone_after_a_wait_and_longer_if_the_next_comes_soon(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found, alone = work.Crew(), []
    for _ in range(9):
        alone.append(alone_after_a_wait(found))
        for _ in range(255):
            found.took(300_000, 1 << 20)
    assert alone == [16, 32, 64, 128, 256, 512, 1024, 1024, 1024]
    found.took(300_000, 1 << 20)
    assert alone_after_a_wait(found) == 16
    assert alone_after_a_wait(found) == 32


def test_large_calls_may_take_their_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = work.Crew()
    found.took(80_000_000, 1 << 24)
    assert found.size(1 << 20) == 2
    found.took(8_000_000, 1 << 20)
    assert [found.size(count) for count in (1 << 20, 1 << 24)] == [1, 2]
