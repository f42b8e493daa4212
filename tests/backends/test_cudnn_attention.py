"""FP8 attention by cuDNN: the operator on a CPU, and on a GPU against its reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention import SDPBackend, sdpa_kernel

import fp8compile
from fp8compile.backends import TRITON, check_attention, cudnn_attention
from fp8compile.errors import OptionError
from fp8compile.passes.cast_attention_backward import HEADS, TOKENS
from tests.models import sqnr_db
from tests.passes.test_cast_attention import Attention
from tests.test_attention import (
    BACKWARD,
    CHECKS,
    SHAPES,
    gradients_in_float32,
    in_float32,
    operands,
    operands_of_backward,
)

HEAD = HEADS[0]
OP, OP_BACKWARD = cudnn_attention.ATTENTION_CUDNN, cudnn_attention.ATTENTION_BACKWARD_CUDNN
BF16 = torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_cpu_it_is_the_reference(shape: tuple[int, ...]) -> None:
    _, args = operands(shape)
    want = torch.ops.fp8.attention(*args)
    for expected, got in zip(want, OP(*args), strict=True):
        assert torch.equal(expected.view(torch.uint8), got.view(torch.uint8))
    torch.library.opcheck(OP, args, test_utils=CHECKS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_cpu_backward_is_the_reference(shape: tuple[int, ...]) -> None:
    _, args = operands_of_backward(shape)
    *want, amax = BACKWARD(*args)
    state = torch.tensor([1e30, 1e-30, 1e-30, 1e-30, 1e30, 0.0])
    for given in (state, None):
        for expected, got in zip(want, OP_BACKWARD(*args, given, 1), strict=True):
            assert torch.equal(expected.view(torch.uint8), got.view(torch.uint8))
    assert state[:1] == 1e30 and state[5] == 0 and state[4] == 1e30  # max-accumulated
    torch.testing.assert_close(state[1:4], amax[:3])
    torch.library.opcheck(OP_BACKWARD, (*args, state, 1), test_utils=CHECKS)


def test_without_the_frontend_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(cudnn_attention.importlib, "import_module", missing)
    with pytest.raises(OptionError, match=r"attention in FP8 needs .*pip install nvidia-cudnn"):
        check_attention(TRITON)
    check_attention("reference")


class Node:
    """A tensor of a graph of cuDNN's: what is said of it."""

    def __init__(self, **said: Any) -> None:
        self.said = said

    def __getattr__(self, name: str) -> Any:
        assert name.startswith("set_")

        def put(value: Any) -> Node:
            self.said[name.removeprefix("set_")] = value
            return self

        return put


class Frontend:
    """Answers like NVIDIA's, and notes what it is asked. It is module and graph in one."""

    data_type = SimpleNamespace(FP8_E4M3="e4m3", FLOAT="f32")
    heur_mode = SimpleNamespace(A="a", FALLBACK="fallback")
    cudnnGraphNotSupportedError = LookupError

    def __init__(self) -> None:
        self.tensor, self.supported, self.stream = Node, True, None
        self.amax: list[float] = []  # what a backward finds, in cuDNN's order

    def pygraph(self, **given: Any) -> Frontend:
        return self

    def sdpa_fp8(self, **given: Any) -> list[Node]:
        self.asked, self.results = given, [Node() for _ in range(4)]
        return self.results

    def sdpa_fp8_backward(self, **given: Any) -> list[Node]:
        self.asked, self.results = given, [Node() for _ in range(7)]
        return self.results

    def build(self, modes: list[str]) -> None:
        if not self.supported:
            raise LookupError("No valid engine configs")

    def get_workspace_size(self) -> int:
        return 24

    def backend_version(self) -> int:
        return 91900

    def create_handle(self) -> str:
        return "handle"

    def set_stream(self, handle: str, stream: int) -> None:
        self.stream = stream

    def execute(self, given: dict[Node, Tensor], workspace: Tensor, handle: str) -> None:
        self.given, self.workspace = given, workspace
        for node, amax in zip(self.results[3:], self.amax, strict=False):
            given[node].fill_(amax)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Frontend]:
    frontend = Frontend()
    monkeypatch.setattr(cudnn_attention.importlib, "import_module", lambda name: frontend)
    monkeypatch.setattr(cudnn_attention, "current_stream", lambda index: 77)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    for cached in (cudnn_attention._handle, cudnn_attention._plan):
        cached.cache_clear()
    yield frontend
    for cached in (cudnn_attention._handle, cudnn_attention._plan):
        cached.cache_clear()


def test_what_cudnn_is_told(stub: Frontend) -> None:
    """Each tensor lies in memory as it says, and is the one that it says."""
    _, args = operands((2, 8, 4, 48, 40, 16, False))
    out, sums = cudnn_attention._run(*args)
    assert (out.shape, out.dtype, sums.shape) == (args[0].shape, torch.float8_e4m3fn, (2, 8, 48))
    told = dict(stub.asked)
    assert [told.pop(name) for name in ("generate_stats", "use_causal_mask")] == [True, False]
    assert told.pop("attn_scale") == args[-1]
    asked = dict(zip(("o", "stats", "amax_s", "amax_o"), stub.results, strict=True)) | told
    q, k, v, q_scale_inv, k_scale_inv, v_scale_inv, out_scale = args[:7]
    brought = {"q": q, "k": k, "v": v, "o": out, "stats": sums, "scale_o": out_scale}
    brought |= {"descale_q": q_scale_inv, "descale_k": k_scale_inv, "descale_v": v_scale_inv}
    for name, tensor in brought.items():
        assert stub.given[asked[name]] is tensor, name
    assert stub.given[asked["descale_s"]] * stub.given[asked["scale_s"]] == 1
    assert stub.given[asked["scale_s"]] == 448
    assert stub.given.keys() == set(asked.values())
    shapes = {"q": (2, 8, 48, 16), "k": (2, 4, 40, 16), "v": (2, 4, 40, 16), "o": (2, 8, 48, 16)}
    for name, (batch, heads, rows, head) in shapes.items():
        by_head = brought[name].view(batch, rows, heads, head).transpose(1, 2)
        said = asked[name].said
        assert (said["dim"], said["stride"]) == (list(by_head.shape), list(by_head.stride())), name
        assert said["data_type"] == "e4m3"
    by_row = sums.unsqueeze(-1)
    assert asked["stats"].said["dim"] == list(by_row.shape)
    assert asked["stats"].said["stride"][:3] == list(by_row.stride())[:3]
    for name in asked.keys() - shapes.keys():
        assert asked[name].said["data_type"] == "f32"
    assert all(result.said["output"] for result in stub.results)
    assert (stub.stream, stub.workspace.nbytes) == (77, 24)


def test_what_cudnn_is_told_of_backward(stub: Frontend) -> None:
    _, args = operands_of_backward((2, 8, 4, 48, 40, 16, False))
    state = torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0])
    stub.amax = [1.0, 2.0, 3.0, 4.0]
    gradients = cudnn_attention._run_backward(*args, state, 1)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in args[1:4]]
    told = dict(stub.asked)
    assert told.pop("use_causal_mask") is False and told.pop("attn_scale") == args[-1]
    names = ("dq", "dk", "dv", "amax_dq", "amax_dk", "amax_dv", "amax_dp")
    asked = dict(zip(names, stub.results, strict=True)) | told
    grad_out, q, k, v, out, sums, *inverses = args[:10]
    brought = {"dO": grad_out, "q": q, "k": k, "v": v, "o": out, "stats": sums}
    brought |= dict(
        zip(("descale_dO", "descale_q", "descale_k", "descale_v"), inverses, strict=True)
    )
    brought |= {"descale_o": inverses[3], "descale_dP": args[11]}
    brought |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    for name, tensor in brought.items():
        assert stub.given[asked[name]] is tensor, name
    for name, scale in zip(("dP", "dQ", "dK", "dV"), args[10], strict=True):
        assert stub.given[asked[f"scale_{name}"]] == scale
    assert stub.given[asked["scale_s"]] == 448
    assert stub.given[asked["scale_s"]] * stub.given[asked["descale_s"]] == 1
    assert stub.given.keys() == set(asked.values())
    assert state.tolist() == [5.0, 4.0, 1.0, 2.0, 3.0]  # of products, query, key and value
    for name, heads, rows in (("dq", 8, 48), ("dk", 4, 40), ("dv", 4, 40), ("dO", 8, 48)):
        by_head = brought[name].view(2, rows, heads, 16).transpose(1, 2)
        said = asked[name].said
        assert (said["dim"], said["stride"]) == (list(by_head.shape), list(by_head.stride())), name
        assert said["data_type"] == "e4m3"
    assert all(result.said["output"] for result in stub.results)


def test_a_plan_is_made_once_for_all_that_is_alike(stub: Frontend) -> None:
    plans = []
    for args in (operands(SHAPES[0])[1], operands(SHAPES[0])[1], operands(SHAPES[1])[1]):
        cudnn_attention._run(*args)
        plans.append(stub.asked)
    assert plans[0] is plans[1] is not plans[2]


def test_what_cudnn_cannot_do_is_said(stub: Frontend) -> None:
    stub.supported = False
    with pytest.raises(OptionError, match=r"cuDNN 91900 has no FP8 for .*batch=2.*high_precision"):
        cudnn_attention._run(*operands(SHAPES[0])[1])


# --- on a GPU -----------------------------------------------------------------------------------

ON_GPU = [
    *SHAPES,
    (1, 8, 2, 1000, 1000, 128, True),
    (1, 4, 1, 200, 333, 128, False),
    (3, 2, 2, 77, 77, 32, True),
    (1, 2, 2, 100, 100, 96, False),
    (1, 2, 1, 2, 64, 64, False),
    (2, 2, 2, 3, 3, 80, True),
]
BACKWARD_ON_GPU = [
    (2, 4, 4, TOKENS, TOKENS, HEAD, True),
    (2, 2, 1, 512, 512, HEAD, False),
    (1, 8, 2, 9 * TOKENS, 9 * TOKENS, HEAD, True),
    (1, 4, 1, 3 * TOKENS, 5 * TOKENS, HEAD, False),
]


@pytest.fixture
def frontend() -> None:
    missing = cudnn_attention.why_not()
    if missing:
        pytest.skip(f"needs {missing}")
    cudnn_attention._plan.cache_clear()  # so that what makes a plan is the first to need it


def on_gpu(shape: tuple[int, ...]) -> tuple[list[Tensor], tuple[Any, ...]]:
    values, args = operands(shape)
    moved = tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in args)
    return [value.cuda() for value in values], moved


@pytest.mark.gpu
@pytest.mark.usefixtures("frontend")
@pytest.mark.parametrize("shape", ON_GPU, ids=str)
def test_it_computes_what_the_reference_does(shape: tuple[int, ...]) -> None:
    """But for the largest product so far, which it takes for the largest of all, and for tensor
    cores, which do not add up FP8 in all bits of float32.
    """
    values, args = on_gpu(shape)
    (want, want_sums), (out, sums) = torch.ops.fp8.attention(*args), OP(*args)
    assert (out.dtype, out.shape, out.is_contiguous()) == (want.dtype, want.shape, True)
    torch.testing.assert_close(sums, want_sums, rtol=2**-10, atol=2**-6)
    assert sqnr_db(want.float(), out.float()) > 30
    exact = in_float32([value.cpu() for value in values], shape)[0]
    found, expected = (sqnr_db(exact, (x.float() * args[5]).cpu()) for x in (out, want))
    assert expected > 20 and abs(found - expected) < 0.3


@pytest.mark.gpu
@pytest.mark.usefixtures("frontend")
@pytest.mark.parametrize("shape", BACKWARD_ON_GPU, ids=str)
def test_backward_computes_what_the_reference_does(shape: tuple[int, ...]) -> None:
    values, args = operands_of_backward(shape)
    *want, amax = BACKWARD(*args)
    given = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
    state = torch.zeros(6, device="cuda")
    found = [x.cpu() for x in OP_BACKWARD(*given, state, 1)]
    torch.testing.assert_close(state.cpu()[1:5], amax, rtol=2**-5, atol=0)
    assert state[0] == state[5] == 0
    exact = gradients_in_float32(values, shape)
    for i, (expected, got) in enumerate(zip(want, found, strict=True)):
        assert sqnr_db(expected.float(), got.float()) > 24
        scale = args[10][i + 1]  # type: ignore[index]
        reached, wanted = (sqnr_db(exact[i], x.float() / scale) for x in (got, expected))
        assert wanted > 17 and abs(reached - wanted) < 0.5


@pytest.mark.gpu
@pytest.mark.usefixtures("frontend")
def test_a_single_query_is_refused() -> None:
    _, args = on_gpu((2, 2, 1, 1, 64, 64, False))
    with pytest.raises(OptionError, match=r"has no FP8 for .*queries=1,"):
        OP(*args)


@pytest.mark.gpu
@pytest.mark.usefixtures("frontend")
def test_threads_and_streams_share_a_plan() -> None:
    """A handle of cuDNN's has one stream at a time."""
    cases = [on_gpu(ON_GPU[3])[1] for _ in range(8)]
    want = [OP(*args)[0].view(torch.uint8) for args in cases]

    def run(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [OP(*cases[index])[0].view(torch.uint8) for _ in range(50)]
            return all(torch.equal(out, want[index]) for out in found)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))


@pytest.mark.gpu
@pytest.mark.usefixtures("frontend")
@pytest.mark.parametrize("backend", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["", "CUDA graphs"])
@pytest.mark.parametrize("attention", ["fp8", "fp8_both"])
def test_a_step_is_that_of_the_reference(
    backend: SDPBackend, cuda_graphs: bool, attention: str
) -> None:
    model = Attention(kv_heads=2, head=HEAD).to("cuda", BF16)
    x = torch.randn(4, 256, 64, device="cuda", dtype=BF16)
    found = []
    for kernels in ("reference", "triton"):
        alike: nn.Module = copy.deepcopy(model)
        options: dict[str, Any] = {
            "attention": attention,
            "decline_slower": False,
            "kernels": kernels,
        }
        if cuda_graphs and kernels == "triton":
            options["inductor"] = {"triton.cudagraphs": True}
        torch._dynamo.reset()
        compiled = torch.compile(alike, backend="fp8", options=options)
        for _ in range(4):
            given = x.clone().requires_grad_()
            alike.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            with sdpa_kernel(backend):
                out = compiled(given)
                out.square().sum().backward()
        tensors = [out, given.grad, *(p.grad for p in alike.parameters())]
        found.append([tensor.detach().clone() for tensor in tensors])
    for want, got in zip(*found, strict=True):
        assert sqnr_db(want, got) > 25


@pytest.mark.gpu
@pytest.mark.usefixtures("frontend")
def test_inference() -> None:
    torch._dynamo.reset()
    model = Attention().to("cuda", BF16)
    x = torch.randn(2, 512, 64, device="cuda", dtype=BF16)
    options = {"attention": "fp8", "decline_slower": False, "strict": True}
    with torch.no_grad():
        got = torch.compile(model, backend="fp8", options=options)(x)
        assert 15 < sqnr_db(model(x), got) < 40
        with pytest.raises(BackendCompilerFailed, match="symbolic"):
            torch._dynamo.reset()
            torch.compile(model, backend="fp8", options=options, dynamic=True)(x)
    assert "FP8 in forward" in str(fp8compile.explain(model, x, options=options))
