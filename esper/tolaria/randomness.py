"""The random generators that a training run draws from, as data."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """States of the global generators of Python, NumPy and torch.

    Attributes:
        python: Version, words and pending Gaussian of ``random``.
        numpy_words: Words of NumPy's legacy generator (MT19937), as int64.
        numpy_rest: Its position, whether a Gaussian is pending, and that.
        torch_cpu: State of torch's CPU generator, uint8.
        torch_cuda: States of the CUDA generators by device, uint8.
    """

    python: tuple[int, list[int], float | None]
    numpy_words: Tensor
    numpy_rest: tuple[int, int, float]
    torch_cpu: Tensor
    torch_cuda: list[Tensor]


def capture() -> RandomState:
    """Returns the states of all generators."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)
    _, numpy_words, position, has_gauss, cached = legacy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return RandomState(
        (version, list(words), gauss),
        torch.from_numpy(numpy_words.astype(np.int64)),
        (int(position), int(has_gauss), float(cached)),
        torch.get_rng_state(),
        list(cuda),
    )


def restore(state: RandomState) -> None:
    """Sets all generators."""
    version, words, gauss = state.python
    random.setstate((version, tuple(words), gauss))
    numpy_words = state.numpy_words.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", numpy_words, *state.numpy_rest))
    torch.set_rng_state(state.torch_cpu)
    if state.torch_cuda:
        torch.cuda.set_rng_state_all(state.torch_cuda)


@contextmanager
def forked() -> Iterator[None]:
    """Leaves all generators as they were, whatever is drawn in the block."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
