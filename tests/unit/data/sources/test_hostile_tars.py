"""Tars that lie, point elsewhere or are made to hang: nothing outside is read or written, what is good is used."""

import io
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys

from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.sources.readers.records import Sample
from megatron_kosmos.data.sources.readers.tars import read_tar
from tests.unit.data.sources.limited_reading import read_limited

BLOCK = tarfile.BLOCKSIZE
Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def pair(key: str) -> list[Member]:
    return [member(f"{key}.png", b"picture"), member(f"{key}.txt", f"text of {key}".encode())]


def write_tar(path: Path, members: Iterable[Member], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE, tail: bytes = b"") -> bytes:
    """Return a block whose checksum is right, whatever its size field and its end say."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:BLOCK])
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[BLOCK - len(tail) :] = tail
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def of_256(size: int) -> bytes:
    """Return a size field in GNU's notation for large and negative numbers."""
    return bytes([0xFF if size < 0 else 0x80]) + (size % (1 << 88)).to_bytes(11, "big")


def pax(name: str, **fields: str) -> list[Member]:
    """Return a member whose pax header says `fields` of it."""
    info, data = member(name, b"x" * 700)
    info.pax_headers = fields
    return [(info, data)]


def test_nothing_outside_of_a_tar_is_read_or_written(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Links, devices and pipes have no content; names with `..` or a root are keys, nothing else."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"secret")
    members: list[Member] = []
    kinds = {"hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE, "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE}
    for key, kind in (kinds | {"pipe": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE}).items():
        link = {"hard": str(outside / "secret.png"), "soft": "../outside/secret.png"}.get(key, "")
        members += [member(f"{key}.png", kind=kind, link=link), member(f"{key}.txt", b"a caption")]
    members += [*pair("../outside/up"), *pair(f"{outside}/root"), *pair("a/../../b"), *pair("."), *pair("./c")]
    file = write_tar(tmp_path / "a.tar", members)
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    outcome = read_limited("caption", file)
    keys = ("../outside/up", str(outside)[1:] + "/root", "a/../../b", "./c")
    assert outcome.good[1][1] in (f"text of /{keys[1]}", f"text of {keys[1]}")
    assert [parts[0] for parts in outcome.good] == ["picture"] * 4
    assert [(origin.removeprefix(f"{file}:"), reason) for origin, reason, _ in outcome.bad] == [
        (key, "missing_image") for key in (*kinds, "pipe", "folder")
    ]
    assert set(outcome.opened) == {str(file)}
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_a_prepared_corpus_has_names_of_its_own(
    tmp_path: Path, tokenizer_folder: Path, picture: Callable[..., bytes]
) -> None:
    members = [member("../../up.png", picture()), member("../../up.txt", b"a caption")]
    members += [member("/etc/passwd.png", picture(1)), member("/etc/passwd.txt", b"x")]
    file = write_tar(tmp_path / "a.tar", members)
    output = tmp_path / "one" / "two" / "corpus"
    manifest = prepare(Preparation("caption", (file,), output, tokenizer_folder))
    assert manifest.documents == 2
    found = {path.name for path in tmp_path.rglob("*")}
    assert found == {"a.tar", "one", "two", *manifest.files, "corpus.manifest.json"}
    with tarfile.open(output.with_name("corpus-images-00000.tar")) as shard:
        assert shard.getnames() == ["000000-000000000.0000.png", "000000-000000001.0000.png"]


def long_name(size: bytes) -> bytes:
    return header("././@LongLink", size, tarfile.GNUTYPE_LONGNAME)


HOSTILE: dict[str, bytes | list[Member]] = {
    "goes back by pax": pax("bad.png", size="-1024"),
    "goes back a little": pax("bad.png", size="-1"),
    "goes back in base 256": header("bad.png", of_256(-1024)),
    "too large by pax": pax("bad.png", size=str(10**30)),
    "a size beyond 64 bits": header("bad.png", of_256(1 << 70)),
    "longer than the file": header("bad.png", of_256(1 << 20)),
    "a size of words": pax("bad.png", size="many"),
    "a name of 8 GB": long_name(of_256(8 << 30)),
    "a name of negative length": long_name(of_256(-512)),
    "a pax header of 8 EB": header("x", of_256(1 << 63), tarfile.XHDTYPE),
    "names of names": long_name(b"00000000001\0") * 3000,
    "sparse without an end": header("bad.png", b"0", tarfile.GNUTYPE_SPARSE, bytes(7) + b"\1" + bytes(23)),
    "a sparse map of negative length": pax("bad.png", **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
    "a sparse member of 8 EB": pax("bad.png", **{"GNU.sparse.size": str(1 << 63), "GNU.sparse.map": "0,1"}),
    "no checksum": b"bad.png" + bytes(505),
    "no header at all": b"x" * 4096,
}


def test_headers_that_lie(tmp_path: Path) -> None:
    """What comes before is used, the rest is one bad document; neither hangs nor takes memory."""
    files = []
    for number, content in enumerate(HOSTILE.values()):
        file = write_tar(tmp_path / f"{number}.tar", [*pair("good"), *pair("lost")])
        if isinstance(content, bytes):
            whole = file.read_bytes()
            file.write_bytes(whole[: 4 * 2 * BLOCK] + content + whole[4 * 2 * BLOCK :])
        else:
            write_tar(file, [*pair("good"), *pair("lost"), *content, *pair("later")])
        files.append(file)
    outcome = read_limited("caption", *files)
    bad = {origin.split(":")[0]: reason for origin, reason, _ in outcome.bad}
    assert len(bad) == len(files)
    for file, what in zip(files, HOSTILE, strict=True):
        assert bad[str(file)] in {"damaged_file", "too_large", "missing_caption"}, what
    assert ["picture", "text of good"] in outcome.good
    assert len(outcome.good) >= len(files)
    assert outcome.megabytes < 100


def test_long_names_and_holes_are_read(tmp_path: Path) -> None:
    key = "d" * 80 + "/" + "k" * 300
    for number, tar_format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        (record,) = read_tar(write_tar(tmp_path / f"{number}.tar", pair(key), tar_format))
        assert record.content == Sample(key, {"png": b"picture", "txt": f"text of {key}".encode()})
    hole = pax("1.png", **{"GNU.sparse.size": "900", "GNU.sparse.map": "100,700"})
    (record,) = read_tar(write_tar(tmp_path / "hole.tar", hole))
    assert record.content == Sample("1", {"png": bytes(100) + b"x" * 700 + bytes(100)})
    data = random.Random(0).randbytes(200_000)  # more between two holes than a header may have
    info, _ = member("1.png")
    info.size, info.pax_headers = len(data), {"GNU.sparse.size": "300000", "GNU.sparse.map": "50000,200000"}
    before, large, after = read_tar(write_tar(tmp_path / "large.tar", [*pair("0"), (info, data), *pair("2")]))
    assert large.content == Sample("1", {"png": bytes(50_000) + data + bytes(50_000)})
    assert [record.place for record in (before, after)] == ["0", "2"]


def test_names_that_are_no_text(tmp_path: Path, tokenizer_folder: Path, picture: Callable[..., bytes]) -> None:
    """They are told with escapes, and the list of bad documents is UTF-8 all the same."""
    file = tmp_path / "a.tar"
    good = write_tar(file, [member("good.png", picture()), member("good.txt", b"a caption")]).read_bytes()[: 4 * BLOCK]
    bad = header("bad.png", b"0").replace(b"bad.png", b"b\xffd.png")
    block = bytearray(bad)
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    file.write_bytes(good + bytes(block) + bytes(1024))
    manifest = prepare(Preparation("caption", (file,), tmp_path / "corpus", tokenizer_folder))
    assert (manifest.documents, manifest.skipped) == (1, {"missing_caption": 1})
    assert b"b\\udcffd" in (tmp_path / "corpus.quarantine.jsonl").read_bytes()


@pytest.mark.parametrize("seed", range(20))
def test_samples_are_those_of_webdataset(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    words = ["a", "b", "dir/a", "dir.x/a", ".hidden", "dir/", "é", "a\nb", "__note__", "__x"]
    suffixes = [".png", ".TXT", ".Json", ".seg.png", "", ".", "..png", ".x/y.png", ".png\n"]
    names = list(dict.fromkeys(draw.choice(words) + draw.choice(suffixes) for _ in range(60)))
    names = [name for name in names if not name.endswith("/")]
    names = [name for name in names if not (name.startswith("__") and name.endswith("__"))]
    # For webdataset a name that repeats ends the file; that is another test.
    names = list({name.lower(): name for name in sorted(names, key=lambda name: name[:1])}.values())
    samples = group_by_keys({"fname": name, "data": name.encode(), "__url__": ""} for name in names)
    theirs = [
        Sample(sample["__key__"], {key: value for key, value in sample.items() if not key.startswith("__")})
        for sample in samples
    ]
    file = write_tar(tmp_path / "a.tar", [member(name, name.encode()) for name in names])
    assert [record.content for record in read_tar(file)] == theirs
    assert len(theirs) > 3
