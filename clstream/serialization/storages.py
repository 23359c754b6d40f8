"""Storages: the memory of tensors and arrays, of which views are to share what they shared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clstream.serialization.encoding import CaptureError, extent
from clstream.serialization.references import References, storage_id


class Storages:
    """Collects the storages of the tensors of a snapshot, each once.

    Args:
        references: what the snapshot refers to: the stream's data is not collected.

    """

    def __init__(self, references: References | None) -> None:
        self.references = references
        self.tensors: list[Tensor] = []  # of bytes, the objects' own
        self.numbers: dict[int, int] = {}
        self.memory: list[tuple[int, int, int, str]] = []  # of arrays and storages: from, to, which of them, whose

    def locate(self, value: Tensor, path: str) -> dict[str, Any]:
        """Return where the bytes of a tensor are: in the stream's data, or in which of the storages."""
        key = storage_id(value)
        if self.references is not None and key in self.references.data and value.numel():
            place = self.references.data[key][0]
            if self.references.changed(key):
                raise CaptureError(
                    f"{path} is a view of the stream's data ({place[1]} {place[2]} of task {place[0]}), which was changed in "
                    "place: .clone() it before"
                )
            return {"place": [*place]}
        if key not in self.numbers:
            self.numbers[key] = len(self.tensors)
            whole = value.detach().untyped_storage()
            self.tensors.append(torch.empty(0, dtype=torch.uint8, device=value.device).set_(whole))
            if value.device.type == "cpu" and whole.nbytes():
                begin = whole.data_ptr()
                self.memory.append((begin, begin + whole.nbytes(), key, path))
        return {"storage": self.numbers[key]}

    def add_array(self, value: np.ndarray[Any, Any], path: str) -> None:
        """Note where the numbers of an array are."""
        if value.size:
            begin = value.__array_interface__["data"][0]
            self.memory.append((begin, begin + value.nbytes, id(value), path))

    def check_sharing(self) -> None:
        """Refuse an array that shares its memory with another one, a tensor or the stream's data: they would be parted."""
        if self.references is None:
            return
        for key, (place, tensor) in self.references.data.items():
            if tensor.layout == torch.strided and tensor.device.type == "cpu":
                begin, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                self.memory.append((begin, begin + size, key, f"the stream's data ({place[1]} {place[2]} of task {place[0]})"))
        end, holder, before = 0, 0, ""
        for begin, until, key, path in sorted(self.memory):
            if begin < end and key != holder:
                first, second = (before, path) if path.startswith("the stream's") else (path, before)
                raise CaptureError(f"{first} shares its memory with {second}, and a checkpoint would part them: keep one of them")
            if until > end:
                end, holder, before = until, key, path

    def trim(self, nodes: list[dict[str, Any]]) -> None:
        """Cut off the ends of storages that no tensor sees, so that they are not written."""
        views: dict[int, list[dict[str, Any]]] = {}
        for node in nodes:
            if "storage" in node:
                views.setdefault(node["storage"], []).append(node)
        for number, sharing in views.items():
            whole = self.tensors[number]
            begin, end = whole.numel(), 0
            for node in sharing:
                if 0 not in node["size"]:
                    width = getattr(torch, node["dtype"]).itemsize
                    begin, end = min(begin, node["offset"] * width), max(end, extent(node) * width)
            begin -= begin % 16  # where a number of any type may begin
            if begin < end and end - begin < whole.numel():
                self.tensors[number] = whole[begin:end].clone()
                for node in sharing:
                    node["offset"] = max(0, node["offset"] - begin // getattr(torch, node["dtype"]).itemsize)


def why_not_plain(value: Tensor) -> str | None:
    """Return what keeps a tensor from being written: more than numbers at strides."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"of {type(value).__module__}.{type(value).__qualname__}"
    if value.is_quantized or value.is_nested or value.is_meta or value.layout not in (torch.strided, torch.sparse_coo):
        kind = (
            "quantised"
            if value.is_quantized
            else "nested"
            if value.is_nested
            else "without data"
            if value.is_meta
            else value.layout
        )
        return f"that is {kind}"
    if value.layout == torch.strided and (value.is_conj() or value.is_neg()):
        return "with a lazy conjugate or negative (.resolve_conj().resolve_neg() makes it plain)"
    return "with named dimensions" if any(getattr(value, "names", ())) else None  # torch 2.14 has no such thing
