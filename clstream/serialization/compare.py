"""Comparison of two snapshots: whether they are equal bit for bit, and what differs first."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from clstream.serialization.capture import Snapshot, capture
from clstream.serialization.encoding import SCALARS, view_of


def hashes(snapshot: Snapshot, gradients: bool = True) -> dict[str, str]:
    """Return a hash of each attribute, tensor and container by its path; equal ones are equal bit for bit."""
    nodes = snapshot["nodes"]
    left_out = set() if gradients else {node["grad"][1] for node in nodes if "grad" in node}
    first: dict[int, dict[str, Any]] = {}  # by storage, what is first met of it

    def feed(into: Any, value: Any) -> None:
        if isinstance(value, Tensor):
            into.update(f"{value.dtype} {tuple(value.shape)} {value.stride()}".encode())
            into.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() if value.numel() else b"")
        elif isinstance(value, list):
            into.update(f"[{len(value)}".encode())
            if value[:1] == ["node"]:
                into.update(repr(nodes[value[1]]["path"]).encode())
            else:
                for item in value:
                    feed(into, item)
        elif isinstance(value, dict):
            into.update(f"{{{len(value)}".encode())
            for name, item in value.items():
                feed(into, name)
                feed(into, item)
        else:
            into.update(repr(value).encode() + b";")

    def of(*values: Any) -> str:
        into = hashlib.blake2b(digest_size=16)
        for value in values:
            feed(into, value)
        return into.hexdigest()

    separate = {"attributes", "path", "origin", "scheduled"} | (set() if gradients else {"grad"})
    hashes_by_path = {}
    for number, node in enumerate(nodes):
        if number in left_out:
            continue
        rest = {name: value for name, value in node.items() if name not in separate}
        if "storage" in node:
            data, shares = view_of(node, snapshot["storages"][rest.pop("storage")]), first.setdefault(node["storage"], node)
            begin = rest.pop("offset") * data.element_size() - shares["offset"] * SCALARS["dtype"][2](shares["dtype"]).itemsize
            rest |= {"data": data, "shares": [shares["path"], begin]}
        hashes_by_path[node["path"]] = of(rest, list(node.get("attributes", ())))
        for name, value in node.get("attributes", {}).items():
            hashes_by_path[f"{node['path']}.{name}"] = of(value)
    return hashes_by_path


def first_difference(snapshot: Snapshot, other: Snapshot) -> str | None:
    """Return the path of the first attribute, tensor or container in which two snapshots differ; None if none does."""
    ours, theirs = hashes(snapshot), hashes(other)
    return next((path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)), None)


def digest(root: object) -> str:
    """Return a hash of all that `root` holds, but for gradients left from the last step: equal digests, equal states."""
    return hashlib.sha256(repr(sorted(hashes(capture([root])[0], gradients=False).items())).encode()).hexdigest()
