"""Weights of an inference graph, quantized once.

Without gradients the same weights would be cast at every call. So what casts them is taken out of
the graph: it becomes a graph of its own, whose results the first one takes as inputs. They are
computed when a weight is new or has changed, and kept with it.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from .arguments import checked_model
from .ir import CAT_ROWS, RESHAPES, SCALED_MMS, args_of, format_graph
from .scaling import generation_of
from .states import listen

WEIGHTS_GRAPH = "fp8_weights_graph"  # key in meta of a graph that does nothing but cast weights


@dataclass(frozen=True)
class Split:
    """An inference graph, changed so that its last inputs are the outputs of ``weights``.

    ``positions``: which of its inputs ``weights`` takes. ``joined``: the outputs that are nothing
    but several inputs of ``weights`` one below the other, by position, with those.
    """

    weights: fx.GraphModule
    positions: list[int]
    outputs: list[Any]  # fake tensors
    joined: dict[int, list[int]]


def split_weights(gm: fx.GraphModule, static: Collection[int]) -> Split | None:
    """Take what GEMMs are given of nothing but ``static`` inputs, by their positions, out of an
    inference graph: quantized weights and their scales. None if nothing is computed of them.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    position = {node: i for i, node in enumerate(inputs)}
    constant = {node for node, i in position.items() if i in static}
    for node in gm.graph.nodes:
        if node.op == "call_function" and _is_constant(node, constant):
            constant.add(node)
    given = [n for mm in gm.graph.nodes if mm.target in SCALED_MMS for n in args_of(mm)[:4]]
    items = [n for n in dict.fromkeys(given) if n in constant and not _is_input(n)]
    if not items:
        return None
    weights, taken = _graph_of(gm, items)
    taken_at = {node: i for i, node in enumerate(taken)}
    joined = {
        i: [taken_at[part] for part in args_of(item)[0]]
        for i, item in enumerate(items)
        if item.target is CAT_ROWS
    }
    with gm.graph.inserting_after(inputs[-1]):
        for item in reversed(items):
            known = gm.graph.placeholder(f"{item.name}_once")
            known.meta["val"] = item.meta["val"]
            item.replace_all_uses_with(known)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    positions, outputs = [position[node] for node in taken], [i.meta["val"] for i in items]
    return Split(weights, positions, outputs, joined)


def _is_input(node: fx.Node) -> bool:
    """Whether it is an input, or another view of one, which costs nothing to have."""
    while node.target in RESHAPES:
        node = args_of(node)[0]
    return node.op == "placeholder"


def _is_constant(node: fx.Node, constant: set[fx.Node]) -> bool:
    pure = not node.is_impure() and not (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )
    return pure and bool(node.all_input_nodes) and all(n in constant for n in node.all_input_nodes)


def _graph_of(
    gm: fx.GraphModule, outputs: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The part of a graph that computes some values, and the inputs that it takes."""
    needed: set[fx.Node] = set()
    found = list(outputs)
    while found:
        node = found.pop()
        if node not in needed:
            needed.add(node)
            found += node.all_input_nodes
    graph, copies, taken = fx.Graph(), dict[fx.Node, fx.Node](), []
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            is_input = node.op == "placeholder"
            # The same in all graphs of a model. Inputs are called as AOTAutograd calls them.
            copies[node]._rename(f"{'arg' if is_input else 'w'}{len(copies)}")
            taken += [node] if is_input else []
    output = graph.output(tuple(copies[node] for node in outputs))
    output.meta["user_visible_output_idxs"] = list(range(len(outputs)))
    part = fx.GraphModule(gm, graph)
    part.meta[WEIGHTS_GRAPH] = True
    return part, taken


# --- at a call ----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Entry:
    """What some graph, known by its text, has computed from some tensors, as they were then; no
    values while they are not needed.
    """

    graph: str
    inputs: list[weakref.ref[Tensor]]
    scales: list[int]  # which of them are; the others are weights
    versioned: list[int]  # which of the others have a version: tensors of inference mode have none
    stamps: list[object] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @staticmethod
    def new(graph: str, inputs: Sequence[Tensor]) -> _Entry:
        scales = [i for i, x in enumerate(inputs) if generation_of(x) is not None]
        versioned = [i for i, x in enumerate(inputs) if i not in scales and not x.is_inference()]
        return _Entry(graph, [weakref.ref(x) for x in inputs], scales, versioned)

    def stamps_of(self, inputs: Sequence[Tensor]) -> list[object]:
        """What changes whenever the inputs' values do, but for writes through ``.data``. Every call
        asks: to look for a generation of each weight, too, takes longer than all the rest.
        """
        stamps: list[object] = [x.data_ptr() for x in inputs]
        stamps += [inputs[i]._version for i in self.versioned]
        stamps += [generation_of(inputs[i]) for i in self.scales]  # they move without a new version
        return stamps

    def is_of(self, graph: str, inputs: Sequence[Tensor]) -> bool:
        if len(inputs) != len(self.inputs) or graph != self.graph:
            return False
        return all(map(operator.is_, [ref() for ref in self.inputs], inputs))


_lock = threading.RLock()
# By one of their inputs: all graphs of a model, such as those of several numbers of tokens, share
# them. They die with that input, and with the last of these graphs.
_entries: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> a WeakSet of entries
_listens = False


class QuantizedWeights:
    """An inference graph that is given its quantized weights, which are computed when they are not
    known. ``main`` and ``weights`` take one list of arguments; ``split`` is what they are made of.
    """

    _boxed_call = True  # AOTAutograd passes one list

    def __init__(
        self, main: Callable[[list[Any]], Any], weights: Callable[[list[Any]], Any], split: Split
    ) -> None:
        self._main, self._weights = main, weights
        self._positions, self._joined = split.positions, split.joined
        self._graph = format_graph(split.weights)
        self._held: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> its entries in use here
        _listen()

    def __call__(self, args: list[Any]) -> Any:
        args.extend(self._values([args[i] for i in self._positions]))
        return self._main(args)

    def _values(self, inputs: list[Tensor]) -> list[Tensor]:
        with _lock:
            entry = self._entry(inputs)
            stamps = entry.stamps_of(inputs)
            if entry.stamps != stamps:
                entry.values = self._computed(inputs, entry.values)
                self._move_into(entry.values, inputs)
                entry.stamps = entry.stamps_of(inputs)
            return entry.values

    def _entry(self, inputs: list[Tensor]) -> _Entry:
        for entry in self._held.get(inputs[0], ()):  # nearly always: every call comes here
            if entry.is_of(self._graph, inputs):
                return entry
        known = _entries.setdefault(inputs[0], weakref.WeakSet())
        found = next((entry for entry in known if entry.is_of(self._graph, inputs)), None)
        entry = found or _Entry.new(self._graph, inputs)
        known.add(entry)
        self._held.setdefault(inputs[0], set()).add(entry)
        return entry

    @torch.inference_mode(False)
    @torch.no_grad()
    def _computed(self, inputs: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        new = list(self._weights(list(inputs)))
        if not old:
            return new
        for kept, value in zip(old, new, strict=True):  # CUDA graphs know where they lie
            kept.copy_(value)
        return old

    def _move_into(self, values: list[Tensor], inputs: list[Tensor]) -> None:
        """Let frozen weights that were put together lie there only."""
        for position, parts in self._joined.items():
            rows = values[position].split([inputs[i].shape[0] for i in parts])
            for i, lies in zip(parts, rows, strict=True):
                inputs[i].data = lies


def _listen() -> None:
    global _listens
    with _lock:
        if not _listens:
            listen(_after_step)
            _listens = True


def _after_step(optimizer: Any, stepped: Container[int] | None, moved: Sequence[Any]) -> None:
    """Training needs the memory, and what was quantized is out of date."""
    _forget(stepped)


def refresh(model: nn.Module) -> None:
    """Let the weights of a model be quantized again when they are next needed.

    Compiled calls without gradients quantize a weight once. They notice that it was written to, by
    an optimizer, ``load_state_dict`` or any operation in place, and take ``update_scales`` for the
    end of a step of training, but not a write through ``.data``, or to a tensor made under
    ``torch.inference_mode()``: then call this. Raises OptionError for what is no model.
    """
    model = checked_model(model, "refresh")
    _forget({id(x) for x in (*model.parameters(), *model.buffers())})


def _forget(changed: Container[int] | None) -> None:
    """Free what was computed from any of the tensors with these ids, or from any."""
    with _lock:
        for entry in [entry for known in _entries.values() for entry in known]:
            if changed is None or any(id(ref()) in changed for ref in entry.inputs):
                entry.stamps, entry.values = [], []
