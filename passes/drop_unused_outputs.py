"""Do not write the copies that nothing reads.

Runs on the joint graph, where it also keeps the casts of a weight in forward and backward apart
(they write different copies, so that no common subexpression is found between them), and again on
the final graphs, where a recomputed cast has fewer users.
"""

from __future__ import annotations

from torch import fx

from ..ir import evaluate, is_cast, quantize_output


def drop_unused_outputs(gm: fx.GraphModule) -> int:
    """Let every cast write only the copies (row-major, transposed) that are used.

    Before:
        w_q   : (e4m3[64, 32], e4m3[32, 64], ...) = fp8.quantize(w, scale, 1, e4m3)
        w_fp8 : e4m3[64, 32] = w_q[0]
    After:
        w_q   : (e4m3[64, 32], e4m3[0], ...) = fp8.quantize(w, scale, 1, e4m3, True, False)
        w_fp8 : e4m3[64, 32] = w_q[0]

    Requires: share_casts.
    Ensures: an output that is not written is not used.
    Leaves alone: casts whose two copies are used.
    Numerics: exact.
    """
    rewrites = 0
    for cast in gm.graph.nodes:
        if not is_cast(cast):
            continue
        wanted = tuple(quantize_output(cast, output) is not None for output in ("fp8", "fp8_t"))
        if wanted != (*cast.args[4:], True, True)[:2]:
            cast.args = (*cast.args[:4], *wanted)
            cast.meta["val"] = evaluate(cast)
            rewrites += 1
    return rewrites
