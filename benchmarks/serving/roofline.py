"""What a workload needs at least: multiplications and additions, whoever does them."""

from benchmarks.kernels.models import Size, module_shapes
from benchmarks.serving.workload import BASE, Workload

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def flops(size: Size, workload: Workload) -> float:
    """A multiply-add counts as two. Each token of a sequence but the last goes through the layers once; the head is
    needed for each token that comes out; a token attends to itself and to all before it."""
    from benchmarks.serving.models import Recipe

    shapes = dict(zip(MODULES, module_shapes(size), strict=True))
    per_token = size.layers * sum(inputs * outputs for inputs, outputs in shapes.values())
    total = 0.0
    for request in workload.requests:
        tokens = len(request.prompt) + request.output_tokens - 1
        weights = per_token
        if request.adapter != BASE:
            recipe = Recipe.of(request.adapter)
            weights += size.layers * recipe.lora_rank * sum(sum(shapes[module]) for module in recipe.modules)
        head = request.output_tokens * size.hidden * size.vocab
        attention = size.layers * 2 * size.hidden * tokens * (tokens + 1) / 2
        total += 2.0 * (tokens * weights + head + attention)
    return total
