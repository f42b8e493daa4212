"""Read a graph, and the regions in it, as records."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from ..backends.bundle import bundles, can_share
from ..backends.emit import bytes_read, bytes_written
from ..backends.fused import emit_once
from ..backends.region import Region
from ..internals import is_primal, is_tangent
from ..ir import SCALED_MMS, TRACK_AMAX, args_of, format_value, is_cast
from .paths import home
from .records import Input, Names, Record, count_of, is_small, record_of


class Reader:
    """Reads one graph. ``sources``: takes the regions' Triton source; ``outputs``: how many of a
    forward's results are the model's, where that is known; ``forward``: what has read the forward,
    if this is its backward, whose records then join those of the forward.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        names: Names,
        sources: dict[str, str],
        *,
        outputs: int | None = None,
        forward: Reader | None = None,
    ) -> None:
        self.gm = gm
        self.names = names
        self.sources = sources
        self.outputs = outputs
        self.is_backward = forward is not None
        self.records = {record.name: record for record in forward.finished()} if forward else {}
        self.known = forward.by_name() if forward else {}
        self.extra: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.values: dict[fx.Node, Input] = {}  # what has none, such as the state, is not drawn
        self.primals = self.tangents = 0

    def read(self) -> None:
        regions: dict[fx.Node, Region] = {}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_module":
                regions[node] = self._region(node)
            elif node.target is operator.getitem:
                self._item(node)
            elif node.op == "output":
                self._output(node)
            else:
                self._operator(node)
        self._note_bundles(regions)

    def finished(self) -> list[Record]:
        """The records, with what was found out about them later."""
        return [
            replace(record, notes=(*record.notes, *self.extra[name]))
            for name, record in self.records.items()
        ]

    def by_name(self) -> dict[str, Input]:
        """The values by the names that a backward graph knows them by."""
        origin = "fp8_origin"  # the name outside of its region
        inner = {n.meta[origin]: value for n, value in self.values.items() if origin in n.meta}
        return inner | {n.name: value for n, value in self.values.items() if origin not in n.meta}

    @property
    def _direction(self) -> str:
        return "backward" if self.is_backward else "forward"

    # --- nodes -------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.known:
            value = self.values[node] = self.known[node.name]
            if not is_primal(node) and not value.small:
                self.extra[value.name].append(("kept for backward", value.type))
            return
        if is_tangent(node):
            self.tangents += 1
            self._input(node, "input", f"gradient of output {_number(node) - 1}", "", True)
            return
        if self.is_backward and is_primal(node):  # the state
            return
        if self.is_backward:  # the forward wrote it under another name
            self._input(node, "input", node.name, "", True)
            return
        index, self.primals = self.primals, self.primals + 1
        names = self.names.inputs
        if index < len(names):
            path = self.names.modules.get(names[index])
            kind = "input" if path is None else "parameter"
            self._input(node, kind, names[index], path or "", False)

    def _input(self, node: fx.Node, kind: str, label: str, path: str, backward: bool) -> None:
        kind_text = format_value(node.meta.get("val"))
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return  # a symbolic size
        self._add(Record(node.name, kind, "", kind_text, path, backward, label=label), node)

    def _add(self, record: Record, node: fx.Node) -> None:
        name = record.name
        while name in self.records:  # the backward computes again what the forward has
            name += "'"
        self.records[name] = replace(record, name=name)
        self.values[node] = Input(name, format_value(node.meta.get("val")), is_small(node))

    def _item(self, node: fx.Node) -> None:
        source = args_of(node)[0]
        if source.op != "call_module" and source in self.values:
            self.values[node] = Input(
                self.values[source].name, format_value(node.meta.get("val")), is_small(node)
            )

    def _operator(self, node: fx.Node, region: str = "") -> None:
        inputs = self._inputs(node)
        path = self.names.path_of(node)
        if path is None:
            # Where gradients meet, the last is that of the layer which they go on through.
            paths = [self.records[value.name].path for value in inputs]
            path = home(paths[-1], paths) if paths else ""
        record = record_of(node, self.names, inputs, path)
        if region:
            name = node.meta["fp8_origin"]
            record = replace(record, name=name, region=region)
        elif node.target is TRACK_AMAX:
            record = replace(record, kind="state")
        # What the backward graph computes again counts as backward.
        self._add(replace(record, backward=record.backward or self.is_backward), node)

    def _inputs(self, node: fx.Node) -> tuple[Input, ...]:
        if node.target is TRACK_AMAX:
            return ()
        given = node.all_input_nodes
        if node.target in SCALED_MMS:  # scales go with what they belong to
            given = [arg for i, arg in enumerate(args_of(node)) if i in (0, 1)]
            given += [n for n in node.all_input_nodes if n not in args_of(node)[:4]]
        elif is_cast(node):
            given = [args_of(node)[0]]
        return tuple(self.values[arg] for arg in given if arg in self.values)

    def _output(self, node: fx.Node) -> None:
        """Note what is returned: outputs and gradients, or what is kept for backward."""
        returned = args_of(node)[0]
        values = [returned] if isinstance(returned, fx.Node) else list(returned)
        if self.is_backward:
            names = [self._gradient_of(i) for i in range(len(values))]
        elif self.tangents:  # a joint graph
            self.outputs = len(values) - self.primals
            gradients = [self._gradient_of(i) for i in range(self.primals)]
            names = [f"output {i}" for i in range(self.outputs)] + gradients
        else:
            count = len(values) if self.outputs is None else self.outputs
            names = [f"output {i}" for i in range(count)]
        for name, value in zip(names, values, strict=False):
            if isinstance(value, fx.Node) and value in self.values:
                self.extra[self.values[value].name].append(("returned as", name))

    def _gradient_of(self, index: int) -> str:
        known = index < len(self.names.inputs)
        return f"gradient of {self.names.inputs[index] if known else f'input {index}'}"

    # --- regions -----------------------------------------------------------------------------

    def _region(self, call: fx.Node) -> Region:
        inner = self.gm.get_submodule(str(call.target))
        assert isinstance(inner, fx.GraphModule)
        name = f"{self._direction}.{call.target}"
        holders = inner.graph.find_nodes(op="placeholder")
        for holder, arg in zip(holders, args_of(call), strict=True):
            if arg in self.values:
                self.values[holder] = self.values[arg]
        region = Region.of(inner)
        self.records[name] = Record(name, "region", str(call.target), "", "", self.is_backward)
        for node in inner.graph.nodes:
            if node.target is operator.getitem:
                self._item(node)
            elif node.op == "call_function":
                self._operator(node, name)
        self._describe(name, call, region)
        outputs = args_of(inner.graph.output_node())[0]
        for item in call.users:
            self.values[item] = self.values[outputs[args_of(item)[1]]]
        return region

    def _describe(self, name: str, call: fx.Node, region: Region) -> None:
        source = emit_once(region)
        key = self._source_key(source.name, source.text)
        inside = [record for record in self.records.values() if record.region == name]
        notes = (
            ("reads", f"{count_of(_hinted(bytes_read(region)))}B"),
            ("writes", f"{count_of(_hinted(bytes_written(region)))}B"),
            ("holds", ", ".join(record.label for record in inside if record.kind != "view")),
        )
        self.records[name] = replace(
            self.records[name],
            type=format_value(call.meta.get("val")),
            path=home(self._result(region, inside).path, [record.path for record in inside]),
            notes=notes,
            source=key,
            label=source.name,
        )

    def _result(self, region: Region, inside: Sequence[Record]) -> Record:
        """What says where a region belongs: its first cast, or if it has none, what it stores."""
        cast = next((record for record in inside if record.kind == "cast"), None)
        if cast is not None:
            return cast
        stored = args_of(region.gm.graph.output_node())[0][0]
        return self.records[self.values[stored].name]

    def _source_key(self, name: str, text: str) -> str:
        """The key of a source; texts that are equal have one."""
        known = next((key for key, other in self.sources.items() if other == text), None)
        key = known or f"{name}.{len(self.sources)}"
        self.sources[key] = text
        return key

    def _note_bundles(self, regions: Mapping[fx.Node, Region]) -> None:
        """Say which casts, of weights mostly, share a launch."""
        calls = {
            region: call
            for call, region in regions.items()
            if can_share(region) and all(is_primal(node) for node in call.all_input_nodes)
        }
        for bundle in bundles(calls):
            for region in bundle if len(bundle) > 1 else ():
                launch = ("launch", f"one for {len(bundle)} casts like this")
                self.extra[f"{self._direction}.{calls[region].target}"].append(launch)


def _number(node: fx.Node) -> int:
    """2 for ``tangents_2``."""
    return int(node.name.rsplit("_", 1)[-1])


def _hinted(size: sympy.Expr) -> Any:
    """A size as a number, if it is one."""
    return float(size) if size.is_number else size
