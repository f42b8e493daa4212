"""What PyTorch is told through its private API, and what it leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
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


def test_the_copy_of_dynamos_graph_refers_to_no_parameter() -> None:
    torch._dynamo.reset()  # no shapes of other tests, which would be symbolic inputs here
    found = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for graph in (gm.graph, internals.clone_dynamo_graph(gm).graph):
            found.append(["grapharg" in node.meta for node in graph.find_nodes(op="placeholder")])
        return gm.forward

    torch.compile(nn.Linear(32, 32), backend=backend)(torch.randn(16, 32))
    assert found == [[True] * 3, [False] * 3], "Dynamo's own graph keeps it"


def test_workers_are_told_that_kernels_are_launched_statically() -> None:
    pool, real = Pool(), AsyncCompile.process_pool
    settings = {"use_static_triton_launcher": True}
    pooled = functools.lru_cache(1)(lambda: pool)
    with (
        mock.patch.object(AsyncCompile, "process_pool", staticmethod(pooled)),
        config.patch({STATIC_LAUNCH: True}),
        internals._static_launch(),
    ):
        workers = AsyncCompile.process_pool()
        assert workers.processes == 2
        for source in ("'x': '*bf16'", "'a': 'tensordesc<fp8e4nv[128, 128]>'"):
            workers.submit(
                torch.relu, functools.partial(torch.relu, "kernel", source), {}, settings
            )
        workers.submit(torch.relu)
    plain, descriptor, other = pool.jobs
    assert plain[-1] == {**settings, STATIC_LAUNCH: True}
    assert descriptor[-1] == {**settings, STATIC_LAUNCH: False}
    assert other == (torch.relu,) and STATIC_LAUNCH not in settings
    assert AsyncCompile.process_pool is real


def test_inductor_stays_patched_until_the_last_thread_has_compiled() -> None:
    real = AsyncCompile.process_pool
    patches = internals._Patches(internals._static_launch)
    patches.__enter__()
    patched = AsyncCompile.process_pool
    patches.__enter__()  # another thread begins
    patches.__exit__()
    assert AsyncCompile.process_pool is patched is not real
    patches.__exit__()
    assert AsyncCompile.process_pool is real
