"""Payloads on their way: only the rows of classes that came are sent, and counted; and a published merge that is not exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clstream.strategy.merging import Payload

ROWS = ":rows"
"""What the name of the tensor ends in that says which rows of another one are sent."""


def compact(payload: Payload) -> dict[str, Tensor]:
    """Return what is sent for a payload: of a tensor with many rows of nothing but 0, the other rows alone, and their numbers.

    `expand` gives the payload back, bit for bit.
    """
    sent: dict[str, Tensor] = {}
    for name, tensor in payload.items():
        rows = tensor.flatten(1).any(1) if tensor.dim() > 1 else tensor != 0
        if tensor.dim() and int(rows.sum()) * 2 <= len(tensor):
            kept = rows.nonzero().flatten()
            sent[name] = tensor[kept]
            sent[name + ROWS] = torch.cat([kept, kept.new_tensor([len(tensor)])]).to(torch.int32)
        else:
            sent[name] = tensor
    return sent


def expand(sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the payload of which this was sent. Raises ValueError for rows that it hasn't."""
    payload: dict[str, Tensor] = {}
    for name, tensor in sent.items():
        if name.endswith(ROWS):
            continue
        rows = sent.get(name + ROWS)
        if rows is None:
            payload[name] = tensor
            continue
        if rows.dim() != 1 or len(rows) != len(tensor) + 1 or rows.is_floating_point():
            raise ValueError(f"{name} was sent with {len(tensor)} rows, and not with the number of each")
        kept, length = rows[:-1].long(), int(rows[-1])
        if len(kept) > length or (len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < length) or length > 2**24:
            raise ValueError(f"{name} was sent with rows that are not among its {length}")
        payload[name] = tensor.new_zeros(length, *tensor.shape[1:]).index_copy_(0, kept.to(tensor.device), tensor)
    return payload


def payload_bytes(payload: Payload) -> int:
    """Return how many bytes of tensors are sent for a payload: see `compact`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in compact(payload).values())


def shifted_as_published(own: Payload, down: Payload, upload: Payload) -> dict[str, Tensor]:
    """Return an upload as the code of Hendryx et al. 2021 takes it up, so that adding it gives the prototypes that theirs gives.

    A client's prototype of a class that the server knew holds the server's samples already, and there it is mixed in by the
    client's new samples alone: mu + k / (n + k) (mu' - mu), with mu' the client's prototype, k its new samples, mu and n the
    server's now. So the new evidence weighs less than it should; a class that is new to the server is exact.

    Args:
        own: sums and counts of the server now.
        down: those that the client took over.
        upload: those of the client's new samples.

    """
    own = own or {name: torch.zeros_like(tensor) for name, tensor in upload.items()}
    down = down or {name: torch.zeros_like(tensor) for name, tensor in upload.items()}
    new, before = upload["counts"], own["counts"]
    client = (down["sums"] + upload["sums"]) / (down["counts"] + new).clamp(min=1)[:, None]
    server = own["sums"] / before.clamp(min=1)[:, None]
    mixed = server + (new / (before + new).clamp(min=1))[:, None] * (client - server)
    sums = torch.where((new > 0)[:, None], mixed * (before + new)[:, None], own["sums"])
    return {"counts": new, "sums": sums - own["sums"]}
