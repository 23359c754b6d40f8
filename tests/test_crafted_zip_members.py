"""Members of zip files that zipfile can't decode, encrypted or of an unknown compression: a sentence, whoever reads them."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from clstream.streams import blobs, image_folder
from crafted_checkpoints import written
from PIL import Image

from clstream.checkpoint import newest
from clstream.models import Mlp
from clstream.pretraining import load_weights, save_weights
from clstream.recording import read, record

FLAGS, COMPRESSION = 0, 2
"""Where a header has them, from the first of its flags on."""


def changed(content: bytes, field: int, value: int) -> bytes:
    """Return a zip file with a field of all headers, local and central, set."""
    content = bytearray(content)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            struct.pack_into("<H", content, at + flags + field, value)
            at = content.find(signature, at + 4)
    return bytes(content)


def weights(folder: Path) -> tuple[Path, object]:
    model = Mlp(6, 4, hidden=(8,))
    file = save_weights(model, folder / "w.pt", {})
    return file, lambda: load_weights(model, file)


def checkpoint(folder: Path) -> tuple[Path, object]:
    torch.save(written(), folder / "000001-0.pt")
    return folder / "000001-0.pt", lambda: newest(folder)


def recording(folder: Path) -> tuple[Path, object]:
    file = record(blobs(), folder / "my.clstream")
    return file, lambda: read(file)


def archive(folder: Path) -> tuple[Path, object]:
    with zipfile.ZipFile(folder / "pets.zip", "w") as pets:
        for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
            Image.new("RGB", (4, 4)).save(folder / "one.png")
            pets.write(folder / "one.png", f"{name}.png")
    return folder / "pets.zip", lambda: image_folder(folder / "pets.zip", tasks=2, test=0.5)


@pytest.mark.parametrize(("field", "value"), [(FLAGS, 1), (COMPRESSION, 97), (COMPRESSION, 12)])
@pytest.mark.parametrize("make", [weights, checkpoint, recording, archive])
def test_members_that_cannot_be_decoded_are_a_sentence(make, field: int, value: int, tmp_path: Path) -> None:
    file, load = make(tmp_path)
    content = changed(file.read_bytes(), field, value)
    if make is recording:  # its end is the hash of all before
        content = content[:-64] + hashlib.sha256(content[:-64]).hexdigest().encode()
    if make is checkpoint:  # its name has the hash of its content
        file.unlink()
        file = tmp_path / f"000001-{hashlib.blake2b(content, digest_size=8).hexdigest()}.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # whose sentence it is differs
        load()
    assert file.name in str(refusal.value) and "\n" not in str(refusal.value)
