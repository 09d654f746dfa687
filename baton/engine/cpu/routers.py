"""Which products of a traced forward choose experts. Their weights are never quantized.

A token's experts are those with the largest scores. An error of a thousandth may put another expert in
the place of one, and from there on everything differs. The weights of all routers together are about a
thousandth of a model's, so nothing is gained by 8 bits. GGUF, AWQ and GPTQ files leave them in full
width, too. The same holds for a gate with a single output, such as that of a shared expert.
"""

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.linear.default)


def routers(graph: Graph) -> frozenset[Node]:
    """The products from whose results the largest are taken, with nothing but row work in between."""
    found, seen = set[Node](), set[Node]()
    waiting = [node for node in graph.nodes if node.target is aten.topk.default]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node.target in PRODUCTS:
                found.add(node)
            elif node not in seen:
                seen.add(node)
                waiting.append(node)
    return frozenset(found)
