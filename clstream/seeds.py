"""Seeds: many independent ones derived from a run's one seed, and code that leaves the global random state as it was."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive(*parts: object) -> int:
    """Return a seed that is a pure function of `parts`, the same on every machine: 0 <= seed < 2**63."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def isolated(*parts: object, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch from `parts`, and restore them afterwards.

    Those of CUDA devices are touched only if `device` is one.

    What is random without a generator of its own (dropout, the initial weights of a module, an augmentation) is so
    reproducible within, and the caller's own draws are the same before and after.
    """
    seed = derive(*parts)
    before = random.getstate(), np.random.get_state()
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for CUDA's generators too, also where they rest
        if cuda:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def random_state_kept(*devices: torch.device) -> Iterator[None]:
    """Restore the random state afterwards: the global generators of Python, numpy, torch, and of the GPUs among some devices."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def random_state(generator: Any) -> str:
    """Return the state of one of Python's or numpy's generators as text; of the modules `random` and `numpy.random` too."""
    if isinstance(generator, random.Random) or generator is random:
        return json.dumps(generator.getstate())
    own = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    bits = own.state if isinstance(own, np.random.BitGenerator) else own.get_state(legacy=False)
    return json.dumps(bits, default=lambda array: {"array": array.tolist(), "type": array.dtype.str})


def set_random_state(generator: Any, state: str) -> None:
    """Put a generator of Python's or numpy's into a state that `random_state` returned; ValueError for what is none."""
    try:
        if isinstance(generator, random.Random) or generator is random:
            version, words, gauss = json.loads(state)
            generator.setstate((version, tuple(words), gauss))
            return
        bits = json.loads(
            state, object_hook=lambda part: np.array(part["array"], "uint64") if part.keys() == {"array", "type"} else part
        )
        inner = bits["state"]
        if not (0 <= inner.get("pos", 0) <= 624 and 0 <= bits.get("buffer_pos", 0) <= 4):  # numpy would read what lies behind
            raise ValueError("there is no such position")
        own = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
        if isinstance(own, np.random.BitGenerator):
            own.state = bits
        else:
            own.set_state(bits)
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"it has no state of a generator ({error})") from None
