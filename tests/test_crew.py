"""How many threads a call in C gets, after calls that had to wait."""

import torch

from polyak.kernels.native import crew


def test_as_many_as_there_is_work_for(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    sizes = [crew.Crew().size(count) for count in (1, 32767, 32768, 65536, 98304, 10**9)]
    assert sizes == [1, 1, 2, 3, 4, 4]


def test_alone_after_a_wait_and_ever_longer(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found, alone = crew.Crew(), []
    for _ in range(9):
        assert found.size(1 << 20) == 2
        found.took(8_000_000, 1 << 20)
        calls = 0
        while found.size(1 << 20) == 1:
            calls += 1
        alone.append(calls)
        found.took(300_000, 1 << 20)
    assert alone == [16, 32, 64, 128, 256, 512, 1024, 1024, 1024]
    for _ in range(1024):
        found.took(300_000, 1 << 20)
    found.took(8_000_000, 1 << 20)
    assert [found.size(1 << 20) for _ in range(17)] == [1] * 16 + [2]


def test_large_calls_may_take_their_time():
    found = crew.Crew()
    found.took(8_000_000, 1 << 27)
    assert found.size(1 << 27) == min(torch.get_num_threads(), 1 + (1 << 12))
