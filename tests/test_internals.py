"""What Inductor is told about our kernels."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile

from fp8compile import internals

STATIC_LAUNCH = "static_launch_user_defined_triton_kernels"


class Pool:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Any, ...]] = []
        self.processes = 2

    def submit(self, *job: Any) -> Future[None]:
        self.jobs.append(job)
        return Future()


def test_workers_are_told_that_kernels_are_launched_statically() -> None:
    pool, real = Pool(), AsyncCompile.process_pool
    settings = {"use_static_triton_launcher": True}
    with (
        mock.patch.object(AsyncCompile, "process_pool", staticmethod(lambda: pool)),
        config.patch({STATIC_LAUNCH: True}),
    ):
        AsyncCompile.process_pool.cache_info = real.cache_info  # type: ignore[attr-defined]
        AsyncCompile.process_pool.cache_clear = real.cache_clear  # type: ignore[attr-defined]
        with internals._static_launch():
            workers = AsyncCompile.process_pool()
            assert workers.processes == 2
            for source in ("'x': '*bf16'", "'a': 'tensordesc<fp8e4nv[128, 128]>'"):
                workers.submit(torch.relu, partial(torch.relu, "kernel", source), {}, settings)
            workers.submit(torch.relu)
    plain, descriptor, other = pool.jobs
    assert plain[-1] == {**settings, STATIC_LAUNCH: True}
    assert descriptor[-1] == {**settings, STATIC_LAUNCH: False}
    assert other == (torch.relu,) and STATIC_LAUNCH not in settings
    assert AsyncCompile.process_pool is real
