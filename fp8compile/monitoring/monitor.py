"""Record what scales and amax do while a model is trained.

The scaling state has it all on the device already. At the interval a Monitor copies that into one
flat tensor per state, which travels to the host while the GPU works on the next step; everything
else happens there. What the state does not hold, ``measure`` finds in the tensors themselves.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NoReturn

from torch import nn

from ..arguments import checked_model
from ..errors import MonitorError, OptionError
from ..options import parse_options
from ..recipe import Operand
from ..records import Record
from ..scaling import ScalingState
from ..states import listen, states_of, unlisten
from .measured import EdgeName, Measured, measure
from .plots import draw_edge, draw_records
from .samples import Looked, Sample, Slot, is_static, sample_of, slots_in, what_is_missing
from .sinks import CsvFile, sinks_of


class Monitor:
    """Watch the scales of a model: ``Monitor(model, every=10, to="run.csv")``.

    Every ``every`` optimizer steps it records, for each edge (a site's input, weight or
    grad_output), the amax and the scale, and how often something went wrong; see ``Record``.
    ``records`` has them all, ``plot`` draws them, and ``to`` says where else they go: a TensorBoard
    ``SummaryWriter`` (any object with ``add_scalar``), the path of a CSV file, a function of one
    record, or a list of these. On a GPU they arrive there one step later, so that nothing has to
    wait for them; ``flush`` does. An exception of a callback ends that later step, when all others
    have had its records.

    The model may be compiled before or after, in one graph or several. A loop without an optimizer
    of ``torch.optim`` ends its steps with ``fp8compile.update_scales``. In distributed training one
    process is enough: the replicas of a DistributedDataParallel have the same scales and amax.

    Recipes whose scales are found in the tensors themselves (current, rowwise, blockwise, mx) keep
    nothing that could be recorded, and static ones keep scales only: a warning says so. ``measure``
    looks at the tensors of one batch, whatever the recipe. Nor is there a record of an edge whose
    cast finds its own scale by ``scaling="auto"``, or of a site whose weight is not a parameter of
    the model: nothing names its state.

    ``step``: how many steps were done before; by default where the CSV file ends, or 0.
    ``options``: those that the model is compiled with, for ``measure``. A Monitor records until
    ``close``, the end of its ``with`` block, or of the model, which it does not keep alive. Raises
    OptionError for arguments that are none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        to: Any = None,
        *,
        step: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        model = checked_model(model, "Monitor")
        self.every = _steps_of("every", every, 1)
        self.measured: dict[EdgeName, Measured] = {}  # what the last ``measure`` saw
        self._options = parse_options(options)
        given = None if step is None else _steps_of("step", step, 0)
        self._sinks = sinks_of(to)
        files = [sink for sink in self._sinks if isinstance(sink, CsvFile)]
        self.step = max([0, *(file.last_step for file in files)]) if given is None else given
        self._model = weakref.ref(model)
        self._slots: weakref.WeakKeyDictionary[ScalingState, list[Slot]]
        self._slots = weakref.WeakKeyDictionary()
        self._samples: list[Sample | Looked] = []
        self._sent = 0  # how many of them are on the host, and have gone to the sinks
        # Who has ended a step, and what moved, since ``step`` was counted: two optimizers may share
        # a model, and end the same step one after the other.
        self._ended_by: set[int] = set()
        self._moved: weakref.WeakSet[ScalingState] = weakref.WeakSet()
        self._counts_otherwise = False  # than by calls of update_scales that move nothing
        self._warned = False
        listen(self._on_step)
        self._end = weakref.finalize(model, self.close)

    # --- at every step --------------------------------------------------------------------------

    def _on_step(
        self, optimizer: Any, stepped: Container[int] | None, moved: Sequence[ScalingState]
    ) -> None:
        model = self._model()
        if model is None or not _steps(model, stepped):
            return
        mine = [state for state in moved if self._slots_of(model, state)]
        if optimizer is None and not mine and self._counts_otherwise:
            return  # update_scales of another model, or after an optimizer that has done it already
        self._counts_otherwise |= optimizer is not None or bool(mine)
        is_known = id(optimizer) in self._ended_by or any(state in self._moved for state in mine)
        is_new = is_known or not self._ended_by
        if is_new:
            self.flush()
            self.step += 1
            self._ended_by, self._moved = set(), weakref.WeakSet()
        self._ended_by.add(id(optimizer))
        self._moved.update(mine)
        if self.step % self.every == 0:
            static = [state for state in states_of(model) if is_new and is_static(state)]
            self._samples += [
                sample_of(state, self.step, self._slots_of(model, state))
                for state in (*mine, *static)
            ]
            self._say_what_is_missing(model)
            if not any(sample.is_on_its_way for sample in self._samples[self._sent :]):
                self.flush()

    def _slots_of(self, model: nn.Module, state: ScalingState) -> list[Slot]:
        if state not in self._slots:
            self._slots[state] = slots_in(state, model)
        return self._slots[state]

    def _say_what_is_missing(self, model: nn.Module) -> None:
        if self._warned:
            return
        self._warned = True
        missing = what_is_missing(model)
        if missing:
            warnings.warn(f"{missing}; {_OFFER}", stacklevel=2)

    # --- what was recorded ----------------------------------------------------------------------

    def flush(self) -> None:
        """Wait for what is still on its way from a GPU, and write it to where it goes."""
        fresh, self._sent = range(self._sent, len(self._samples)), len(self._samples)
        for i in fresh:
            self._samples[i] = self._samples[i].on_host()
        if fresh and self._sinks:
            records = [record for i in fresh for record in self._samples[i].records()]
            with contextlib.ExitStack() as stack:  # each gets them, whichever of them raises
                for sink in reversed(self._sinks) if records else ():
                    stack.callback(sink, records)

    @property
    def records(self) -> list[Record]:
        """Everything so far, in the order in which it was recorded; made anew at every access."""
        self.flush()
        return [record for sample in self._samples for record in sample.records()]

    def measure(
        self, *inputs: Any, step: Callable[..., Any] | None = None, **kwargs: Any
    ) -> list[Record]:
        """Look at the operands of one batch: what share of each saturates and underflows, its SQNR,
        and its histogram, for ``plot_edge``.

        The model is called with ``inputs`` and ``kwargs``. ``step(call, *inputs, **kwargs)``: how
        to use them, if not like that: it calls ``call`` in place of the model and returns the loss.
        Without a scalar loss there is no backward, and nothing is known of gradients.

        It runs in the model's own precision, operator by operator, and casts every operand beside
        it, with the scale that the next step will use; the training graph is as fast as before.
        Parameters, gradients, buffers, scales and random number generators are left as they were.
        Compiling for this takes seconds: not for every step. The records join the others.

        Raises OptionError if the model was compiled with other recipes than the Monitor's options
        say, or has nothing in FP8, and MonitorError if the model is gone.
        """
        model = self._model()
        if model is None:
            raise MonitorError("the model that this Monitor watched no longer exists")

        def run(call: Callable[..., Any]) -> Any:
            return (step or _plainly)(call, *inputs, **kwargs)

        self.measured = measure(model, run, self._options)
        found = [each.record(self.step, name) for name, each in self.measured.items()]
        self._samples.append(Looked(tuple(found)))
        self.flush()
        return found

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the scales of each role over the steps, and the amax of every edge as heat maps.

        Above: the median of log2(scale) over edges, the 10th to 90th percentile, and the smallest
        to the largest, as in figures of arXiv 2309.17224, without those edges that find their own
        in that step. Below: log2(amax), a row per site, marked where something went wrong. Returns
        a matplotlib ``Figure``, and saves it to ``path``, in the format that its ending names.
        Raises MonitorError if there is nothing to draw, or no matplotlib.
        """
        records = self.records
        if not records:
            raise MonitorError(f"nothing is recorded: {self._why_not()}")
        return _saved(draw_records(records), path)

    def plot_edge(
        self,
        site: str,
        operand: str | Operand = Operand.INPUT,
        path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Draw the histogram of one edge, as ``measure`` last saw it, against the values of E4M3
        and E5M2; as ``plot``.
        """
        if not self.measured:
            raise MonitorError("no edge is measured: call monitor.measure(...) before plot_edge")
        for (first, role), edge in self.measured.items():
            if site in (first, *edge.sites) and role == str(operand):
                return _saved(draw_edge(f"{site}, {role}", edge), path)
        known = ", ".join(f"{first} {role}" for first, role in self.measured)
        raise MonitorError(f"no edge {site!r}, {str(operand)!r} is measured; there are {known}")

    def _why_not(self) -> str:
        model = self._model()
        if self.step < self.every:
            return f"{self.step} steps have ended, and every={self.every}"
        missing = None if model is None else what_is_missing(model)
        return f"{missing}; {_OFFER}" if missing else "no step of training has moved its scales"

    # --- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Write what is left, and record no more; what is recorded stays."""
        self._end.detach()
        unlisten(self._on_step)
        self.flush()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise MonitorError(
            "a Monitor watches one model in one process, and can be neither copied nor pickled: "
            "keep it out of what is, and make a new one for the copy, Monitor(copy, ...)"
        )


_OFFER = "monitor.measure(...) looks at the tensors themselves"


def _steps_of(name: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name}={value!r}: give a number of optimizer steps, {least} or more")
    return value


def _plainly(call: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    return call(*inputs, **kwargs)


def _steps(model: nn.Module, stepped: Container[int] | None) -> bool:
    """Whether a step is one of this model: mostly, its first parameter says so."""
    return stepped is None or any(id(parameter) in stepped for parameter in model.parameters())


def _saved(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
