"""Files of weights from somebody else: no pickle, no bomb, nothing but tensors."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from clstream.models import Mlp
from clstream.pretraining import load_weights, save_weights
from clstream.serialization import torch_files


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def weights(place: Path) -> tuple[nn.Module, Path, dict]:
    model = Mlp(6, 4, hidden=(8,))
    file = save_weights(model, place / "w.pt", {})
    return model, file, torch.load(file, weights_only=True)


def packed(file: Path, change=lambda name, content: content, how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(file, "w", how) as out:
        for name, content in members.items():
            out.writestr(name, change(name, content))


def test_weights_are_no_pickle(place):
    model, file, content = weights(place)
    torch.save(content | {"weights": Runs()}, file)
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, file)
    file.write_bytes(pickle.dumps(content | {"weights": Runs()}))
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, file)
    packed(weights(place)[1], lambda name, data: pickle.dumps(Runs()) if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, place / "w.pt")
    assert not Path("ran").exists()


def test_weights_are_no_bomb(place):
    model, file, content = weights(place)
    torch.save(content | {"more": torch.zeros(1 << 24)}, file)
    packed(file, how=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 18
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, file)
    assert load_weights(model, weights(place)[1])["model"] == "Mlp"


def two_faced(members: dict[str, bytes]) -> bytes:
    """Return a zip file with two directories: to Python its members are as they are, to torch the largest is packed."""
    body, told, seen = b"", b"", b""
    largest = max(members, key=lambda name: len(members[name]))
    for name, data in members.items():
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        inner = deflate.compress(data) + deflate.flush() if name == largest else data
        how, crc, encoded = 8 if name == largest else 0, zlib.crc32(data), name.encode()

        def entry(how: int, size: int, crc=crc, inner=inner, encoded=encoded, at=len(body)) -> bytes:
            sizes = (crc, len(inner), size, len(encoded), 0, 0, 0, 0, 0, at)
            return struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, how, 0, 33, *sizes) + encoded

        seen, told = seen + entry(0, len(inner)), told + entry(how, len(data))
        head = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, how, 0, 33, crc, len(inner), len(data), len(encoded), 0)
        body += head + encoded + inner
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(members), len(members), len(told), len(body), 0)
    return body + told + seen + end


class Asks:
    def __reduce__(self):
        return bytearray, (1 << 20,)


def test_torch_reads_no_other_members_than_were_looked_at(place):
    torch.save({"more": torch.zeros(1 << 20)}, "whole.pt")
    with zipfile.ZipFile("whole.pt") as source:
        members = {name: source.read(name) for name in source.namelist()}
    whole = Path("whole.pt").read_bytes()
    crafted = two_faced(members)
    Path("two.pt").write_bytes(crafted)
    with zipfile.ZipFile("two.pt") as seen:
        assert all(not member.compress_type for member in seen.infolist())
    assert torch.load("two.pt", weights_only=True)["more"].shape == (1 << 20,)  # the bomb is one
    at = len(whole) - 98  # the end record of 64 bits
    moved = whole[:at] + whole[at:][:64] + struct.pack("<Q", at - 8) + whole[at + 72 :]
    for content in (crafted, b"before" + whole, b"PK\3\4" + whole, whole + b"behind", whole[:-2] + b"\1\0c", moved):
        Path("two.pt").write_bytes(content)
        with pytest.raises(ValueError, match="its directory is not where torch writes it"):
            torch_files.load(Path("two.pt"))
    assert torch_files.load(Path("whole.pt"))["more"].shape == (1 << 20,)


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL", "Data.pkl"])  # by each of which torch finds it
def test_a_pickle_asks_for_no_memory_by_a_number(place, name):
    torch.save({"a": [Asks()]}, "asks.pt")
    with zipfile.ZipFile("asks.pt") as source:
        members = {member.replace("data.pkl", name): source.read(member) for member in source.namelist()}
    with zipfile.ZipFile("asks.pt", "w") as out:
        for member, content in members.items():
            out.writestr(member, content)
    assert len(torch.load("asks.pt", weights_only=True)["a"][0]) == 1 << 20  # torch itself gives it
    with pytest.raises(ValueError, match="bytearray', which no tensor needs"):
        torch_files.load(Path("asks.pt"))


def test_what_torch_saves_of_tensors_is_read(place):
    tensors = [torch.ones(3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.uint16, torch.complex64, torch.bool)]
    content = {"a": tensors, "b": nn.Parameter(torch.ones(2)), "c": nn.Linear(2, 2).state_dict(), "d": torch.Size((1, 2))}
    torch.save(content, "whole.pt")
    again = torch_files.load(Path("whole.pt"))
    assert all(
        torch.equal(before, after) and before.dtype == after.dtype for before, after in zip(tensors, again["a"], strict=True)
    )
    assert (again["d"], list(again["c"]), type(again["b"])) == ((1, 2), ["weight", "bias"], nn.Parameter)


@pytest.mark.parametrize(
    "change",
    [
        {"header": "[]"}, {"header": "{}"}, {"header": 5}, {"header": "[" * 50_000}, {"header": '{"format": "clstream weights 1"}'},
        {"weights": 5}, {"weights": []}, {"weights": {"body.0.weight": 5}}, {"weights": {5: torch.ones(2)}},
        {"weights": {"a": torch.ones(2, 2).to_sparse()}}, {"weights": {"a": torch.ones(2, device="meta")}},
    ],
)  # fmt: skip
def test_weights_of_other_kinds_are_refused(place, change):
    model, file, content = weights(place)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    torch.save(content | change, file)
    with pytest.raises(ValueError, match="is no file of weights that"):
        load_weights(model, file)
    assert all(torch.equal(before[name], weights) for name, weights in model.state_dict().items())


def test_weights_of_another_shape_or_dtype_are_refused(place):
    model, file, content = weights(place)
    name = next(name for name in content["weights"] if not name.startswith("head"))
    weight = content["weights"][name]
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)  # a terabyte, of four bytes in the file
    for other, sentence in ((weight.double(), "is torch.float64 there"), (weight[:1], "there"), (huge, r"\(1048576, 1048576\)")):
        torch.save(content | {"weights": content["weights"] | {name: other}}, file)
        with pytest.raises(ValueError, match=sentence):
            load_weights(model, file)


def test_a_file_of_weights_that_is_cut_is_refused(place):
    model, file, _ = weights(place)
    whole = file.read_bytes()
    for size in range(0, len(whole), len(whole) // 23):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is no file of weights that"):
            load_weights(model, file)
