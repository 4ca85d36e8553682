"""README.md of a model folder: what it is, how to load it, and what has grown."""

import math

from esper.artifacts.architecture import Architecture


def model_card(architecture: Architecture) -> str:
    """Returns the model card as Markdown."""
    host = sum(math.prod(layout.shape) for layout in architecture.tensors.values())
    rows = [
        f"| `{slot}` | {seed} | {kernel.blueprint_name or '-'} | {planted.state} "
        f"| {planted.alpha:g} | {kernel.parameter_count:,} | `{planted.kernel[:12]}` |"
        for slot, entry in architecture.slots.items()
        for seed, planted in enumerate(entry.seeds)
        if planted.kernel
        for kernel in [architecture.kernels[planted.kernel]]
    ]
    grafts = sum(
        architecture.kernels[planted.kernel].parameter_count
        for entry in architecture.slots.values()
        for planted in entry.seeds
        if planted.kernel
    )
    evaluate = ""
    if architecture.task is not None:
        evaluate = (
            f"\nIt belongs to the task `{architecture.task}`; `esper evaluate` with this folder "
            "prints its test accuracy.\n"
        )
    table = "\n".join(
        [
            "| slot | seed | blueprint | state | alpha | parameters | kernel |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    return f"""# A model grown by Esper {architecture.esper_version}

A `{architecture.host_class}` with {host:,} elements of its own and {grafts:,} in grafts.
{evaluate}
## Load it

```python
import esper

model = esper.load("path/to/this/folder", host)  # host: a new {architecture.host_class}
plain = esper.harden(model)  # a torch.nn.Module that needs no Esper
```

## What has grown

{table if rows else "Nothing: no seed holds a kernel."}

## Files

| file | what it holds |
|---|---|
| `weights.safetensors` | tensors of the host (`host.*`) and of the grafts (`slots.*`) |
| `architecture.json` | structure, kernels, lifecycle and the digests of the other files |
| `growth_history.jsonl` | one lifecycle event per line |

Nothing here is executed when it is loaded.
"""
