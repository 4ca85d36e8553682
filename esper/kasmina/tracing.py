"""How data flows through a model: calls of layers and functions in order, with their inputs.

Two ways lead there. ``traced`` follows ``torch.fx`` proxies through ``forward`` and needs no data;
what looks at values cannot be followed, so such a module stays one closed step and each module
inside it is traced by itself. ``recorded`` runs the model once on example inputs and sees all.

Both work on a copy whose buffers are its own and whose parameters, which nobody writes to, are the
model's.
"""

import contextlib
import copy
import inspect
import random
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

import torch
from torch import Tensor
from torch import fx
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from esper.kasmina.modes import evaluating

Inputs = tuple[Sequence[object], Mapping[str, object]]
"""Positional and keyword inputs of a model."""

# Modules that count as one step although they may have children of their own.
_WHOLE = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase)


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """One call in a forward.

    Attributes:
        name: FQN of the module that was called, empty for a function and for an input.
        function: Name of the function, without underscores around it; empty for a module.
        inputs: The steps whose results it was given, in order.
    """

    name: str
    function: str
    inputs: tuple["Step", ...]


@dataclass(slots=True)
class Flow:
    """What was seen of one forward.

    Attributes:
        steps: All steps in order of execution.
        blocks: Calls of modules that other modules run in: FQN and the step that made the result,
            inner ones first.
    """

    steps: list[Step] = field(default_factory=list)
    blocks: list[tuple[str, Step]] = field(default_factory=list)


def traced(host: nn.Module) -> list[Flow]:
    """Returns the flows of a model, and of those of its modules that had to be taken separately.

    Args:
        host: The model; left as it is, and not run.

    Raises:
        ValueError: If the model cannot be copied.
    """
    flows: list[Flow] = []
    with _untouched(host) as twin:
        names = {module: name for name, module in reversed(list(twin.named_modules()))}
        pending = [twin]
        while pending:
            module = pending.pop(0)
            tracer = _Tracer()
            try:
                graph = tracer.trace(module, _defaults(module))
            except Exception:  # whatever a forward does with what has no value
                pending += [child for child in module.children() if not _is_whole(child)]
                continue
            flows.append(_flow(graph, tracer, module, names))
            pending += tracer.closed
    return flows


def recorded(host: nn.Module, inputs: Inputs) -> list[Flow]:
    """Returns the flow of one forward in eval mode.

    Args:
        host: The model; left as it is.
        inputs: What a copy of it is run on.

    Raises:
        ValueError: If the model cannot be copied.
    """
    args, kwargs = inputs
    with _untouched(host) as twin, evaluating(twin), _Recorder() as recorder:
        recorder.watch(twin, (args, kwargs))
        twin(*args, **kwargs)
    return [recorder.flow]


def _is_whole(module: nn.Module) -> bool:
    return isinstance(module, _WHOLE) or not any(True for _ in module.children())


@contextlib.contextmanager
def _untouched(host: nn.Module) -> Iterator[nn.Module]:
    """A copy of a model to follow, and random states that stand where they stood afterwards."""
    kept: dict[int, object] = {}
    for module in host.modules():
        owned = {id(buffer) for buffer in module.buffers(recurse=False)}
        tensors = [value for value in tree_leaves(vars(module)) if isinstance(value, Tensor)]
        kept.update((id(tensor), tensor) for tensor in tensors if id(tensor) not in owned)
    try:
        twin = copy.deepcopy(host, kept)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"target_layers is 'auto', but the model cannot be copied to be traced ({error}); name "
            "its layers instead"
        ) from error
    drawn = random.getstate()
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused path hides the layers inside it
    try:
        with torch.random.fork_rng():
            yield twin
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        random.setstate(drawn)


# ------------------------------------------------------------------ by torch.fx


def _defaults(module: nn.Module) -> dict[str, object]:
    """The optional inputs of a forward at their defaults, as most callers leave them."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


class _Tracer(fx.Tracer):
    """Follows a forward; a module in it that cannot be followed becomes a closed step."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[nn.Module] = []
        self.blocks: list[tuple[nn.Module, fx.Node]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_whole(m)

    def call_module(self, m, forward, args, kwargs):  # type: ignore[no-untyped-def]
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        num_nodes, num_blocks = len(self.graph.nodes), len(self.blocks)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever a forward does with what has no value
            for node in reversed(list(self.graph.nodes)[num_nodes:]):
                self.graph.erase_node(node)
            del self.blocks[num_blocks:]
            self.closed.append(m)
            return self.create_proxy("call_module", name, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.blocks.append((m, result.node))
        return result


def _flow(
    graph: fx.Graph, tracer: _Tracer, root: nn.Module, names: Mapping[nn.Module, str]
) -> Flow:
    flow = Flow()
    steps: dict[fx.Node, Step] = {}
    for node in graph.nodes:
        name = names[root.get_submodule(str(node.target))] if node.op == "call_module" else ""
        function = "" if name else _function_name(node.target)
        step = Step(name, function, tuple(steps[source] for source in node.all_input_nodes))
        steps[node] = step
        flow.steps.append(step)
        if node.op == "output" and root in names and node.all_input_nodes:
            tracer.blocks.append((root, node.all_input_nodes[0]))
    flow.blocks = [(names[module], steps[node]) for module, node in tracer.blocks]
    return flow


def _function_name(target: object) -> str:
    return (target if isinstance(target, str) else getattr(target, "__name__", "")).strip("_")


# ------------------------------------------------------------------ by running


class _Recorder(TorchFunctionMode):
    """Notes every call of a leaf module, and of a torch function outside of one."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self._made: dict[int, Step] = {}
        self._alive: list[Tensor] = []  # so that no id is given out twice
        self._inside = 0

    def watch(self, model: nn.Module, inputs: object) -> None:
        """Hooks the modules of a model that is about to run, once, on inputs."""
        self._note("", "input", (), inputs)
        for name, module in model.named_modules():
            if _is_whole(module):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave(name), with_kwargs=True)
            else:
                module.register_forward_hook(self._close(name))

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self._note("", _function_name(func), (args, kwargs), result)
        return result

    def _enter(self, module: nn.Module, args: object) -> None:
        self._inside += 1

    def _leave(self, name: str):  # type: ignore[no-untyped-def]
        def leave(module: nn.Module, args: object, kwargs: object, result: object) -> None:
            self._inside -= 1
            self._note(name, "", (args, kwargs), result)

        return leave

    def _close(self, name: str):  # type: ignore[no-untyped-def]
        def close(module: nn.Module, args: object, result: object) -> None:
            if isinstance(result, Tensor) and id(result) in self._made:
                self.flow.blocks.append((name, self._made[id(result)]))

        return close

    def _note(self, name: str, function: str, given: object, result: object) -> None:
        sources = [self._made.get(id(leaf)) for leaf in tree_leaves(given)]
        known = tuple(dict.fromkeys(source for source in sources if source is not None))
        step = Step(name, function, known)
        self.flow.steps.append(step)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._made[id(leaf)] = step
                self._alive.append(leaf)
