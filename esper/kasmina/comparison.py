"""The host as it was when it was wrapped, kept apart for comparison."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch import nn

from esper.kasmina.modes import evaluating
from esper.kasmina.outputs import find_tensor


class Original:
    """A private copy of a host; its parameters belong to nobody's ``parameters()``.

    Args:
        host: The model to keep.

    Raises:
        ValueError: If the model cannot be copied.
    """

    def __init__(self, host: nn.Module) -> None:
        try:
            self._host = copy.deepcopy(host)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"preserve_original is True, but the model cannot be copied ({error}); pass "
                "preserve_original=False"
            ) from error
        self._host.requires_grad_(False)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Moves the copy along when the wrapped model changes device or type."""
        self._host._apply(change)

    def compare(self, model: nn.Module, inputs: tuple[object, ...]) -> dict[str, float]:
        """Compares the first tensor that model and copy return for the same inputs.

        Both run in eval mode without gradients; modes and random state are restored.

        Args:
            model: The model as it is now.
            inputs: Positional inputs.

        Returns:
            ``max_abs_difference``, ``max_rel_difference`` (over the largest magnitude of the
            copy's output) and ``cosine`` of the two outputs.
        """
        with torch.random.fork_rng(), torch.no_grad():
            state = torch.get_rng_state()
            with evaluating(model):
                now = _first(model(*inputs))
            torch.set_rng_state(state)
            before = _first(self._host.eval()(*inputs))
        difference = float((now - before).abs().max())
        largest = float(before.abs().max())
        cosine = torch.nn.functional.cosine_similarity(now.flatten(), before.flatten(), dim=0)
        return {
            "max_abs_difference": difference,
            "max_rel_difference": difference / largest if largest > 0 else difference,
            "cosine": float(cosine),
        }


def _first(output: object) -> Tensor:
    found = find_tensor(output)
    if found is None:
        raise ValueError("the model's output holds no floating-point tensor to compare")
    return found[1].double()
