"""Two processes: DistributedDataParallel trains as one process that accumulates both gradients;
FSDP2 trains with current scaling.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fp8compile
from tests.helpers import compile_interpreted
from tests.models import MLP, sqnr_db

STEPS, WORLD = 4, 2
pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return MLP(64, 128)


def batch(step: int, rank: int) -> Tensor:
    """The ranks see inputs of different sizes and magnitudes."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (1 + rank) * torch.randn(16 * (2 - rank), 64, generator=generator)


def loss_of(model: Any, step: int, rank: int) -> Tensor:
    """In one step the gradients of one rank are a spike."""
    return (100 if (step, rank) == (1, 1) else 1) * model(batch(step, rank)).square().mean()


def results(model: nn.Module) -> dict[str, Tensor]:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights | fp8compile.state_dict(model)


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "compiled, then wrapped": lambda model: DistributedDataParallel(compile_interpreted(model)),
    "wrapped, then compiled": lambda model: compile_interpreted(DistributedDataParallel(model)),
}


def work(rank: int, port: int, folder: str) -> None:
    """A process of its own, which saves what it has found for every way of distributing."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {how: train_one_rank(rank, wrap) for how, wrap in WRAPPED.items()}
    torch.save({**found, "sharded": call_sharded(rank)}, f"{folder}/{rank}")
    dist.destroy_process_group()


def train_one_rank(
    rank: int, wrap: Callable[[nn.Module], Any]
) -> tuple[dict[str, Tensor], int, list[fp8compile.Record]]:
    """Weights and scaling state after STEPS steps, how many collectives there were, and what a
    Monitor in one of the processes has recorded.
    """
    torch._dynamo.reset()
    model = make_model()
    run = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = fp8compile.Monitor(model, every=2) if rank == 0 else None
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        for step in range(STEPS):
            loss_of(run, step, rank).backward()
            optimizer.step()
            optimizer.zero_grad()
    return results(model), reduce.call_count, monitor.records if monitor else []


def call_sharded(rank: int) -> tuple[str, Tensor, dict[str, Tensor]]:
    """What delayed scaling says to FSDP2; and the output and gradients with current scaling."""
    torch._dynamo.reset()
    model = fully_shard(make_model(), mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(Exception, match="FSDP shards") as error:
        compile_interpreted(model)(batch(0, rank))
    output = compile_interpreted(model, {"recipe": "current"})(batch(0, rank))
    output.square().mean().backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return str(error.value), output.detach(), gradients


def train_alone() -> dict[str, Tensor]:
    """The plain loop: both batches one after the other, the mean of their gradients."""
    model = make_model()
    compiled = compile_interpreted(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        for rank in range(WORLD):
            loss_of(compiled, step, rank).backward()
        for parameter in model.parameters():
            parameter.grad /= WORLD
        optimizer.step()
        optimizer.zero_grad()
    return results(model)


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("how", WRAPPED)
def test_two_processes_train_like_one(how: str, by_rank: list[dict[str, Any]]) -> None:
    (first, reductions, _), (second, _, _) = (found[how] for found in by_rank)
    assert reductions == STEPS, "one collective per step"
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"the replicas differ in {name}"
    assert first["down.weight.scale"][2] == 0, "a guard rail holds for the spike's edge in both"
    for name, value in train_alone().items():
        torch.testing.assert_close(first[name], value, rtol=2e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("how", WRAPPED)
def test_a_monitor_in_one_process_sees_the_scales_of_all(
    how: str, by_rank: list[dict[str, Any]]
) -> None:
    (_, _, records), (others, _, _) = (found[how] for found in by_rank)
    last = {(r.site, r.operand): r.scale for r in records if r.step == STEPS}
    assert {r.step for r in records} == {2, STEPS} and len(last) == 6
    for role, operand in enumerate(fp8compile.Operand):
        for site in ("gate", "down"):
            scale = float(others[f"{site}.weight.scale"][role])
            assert (last[site, str(operand)] or 0.0) == scale


def test_fsdp2_trains_with_current_scaling_and_delayed_scaling_says_so(
    by_rank: list[dict[str, Any]],
) -> None:
    model = make_model()
    for rank in range(WORLD):
        model(batch(0, rank)).square().mean().div(WORLD).backward()
    for rank, found in enumerate(by_rank):
        message, output, gradients = found["sharded"]
        assert "choose options={'recipe': 'current'}" in message
        assert 25 <= sqnr_db(model(batch(0, rank)).detach(), output) < 60
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert sqnr_db(parameter.grad, gradients[name]) >= 18, name
