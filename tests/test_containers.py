"""Image definitions, locks, the tree digest and the build's errors; with Apptainer and a built image, its own test."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobie.containers import build as build_module
from mobie.containers.apptainer import apptainer_environment, missing_capabilities
from mobie.containers.build import Options, build, clean, debian_packages, debian_sources, unpack
from mobie.containers.images import IDENTITY, IMAGES, Image, chosen, read_digests
from mobie.containers.lock import normal_name, read_lock
from mobie.containers.pip_settings import local_folders, pip_settings, write_settings
from mobie.containers.tree import tree_digest, tree_lines
from mobie.errors import ConfigError, DataError, UnsupportedError
from mobie.paths import PACKAGE, Layout
from mobie.provenance import file_hash

ROOT = PACKAGE.parent
CONTAINERS = ROOT / "containers"
ADDRESS = re.compile(r"\b(?:https?|ftp|file|docker|oras|library)://", re.IGNORECASE)
images = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)


def pins(path: Path) -> dict[str, str]:
    """Package → version of a requirements file."""
    found = re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE)
    return {normal_name(name): version for name, version in found}


# Definitions and locks


@images
def test_a_definition_uses_the_arguments_that_the_build_gives(image: Image) -> None:
    text = image.definition(ROOT).read_text()
    used = set(re.findall(r"\{\{ (\w+) \}\}", text))
    given = set(re.findall(r"^    (\w+)=", text.split("%arguments")[1].split("%labels")[0], re.MULTILINE))
    assert used == given == {"rootfs", "lock", "lock_sha256", "commit", "epoch"}
    assert text.count("--require-hashes") >= 1 and "--no-deps" in text
    sections = re.findall(r"^%(\w+)", text, re.MULTILINE)
    assert {"labels", "files", "post", "environment", "test", "help"} <= set(sections)


@pytest.mark.parametrize("section", ["post", "environment", "test"])
@images
def test_scripts_of_a_definition_are_shell(image: Image, section: str) -> None:
    text = image.definition(ROOT).read_text()
    script = re.search(rf"^%{section}\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL)[1]
    done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_of_an_image_holds_an_address() -> None:
    files = [*CONTAINERS.glob("*.*"), CONTAINERS / "build", CONTAINERS / "lock", CONTAINERS / "get-apptainer"]
    files += [*(CONTAINERS / "locks").glob("*"), *(PACKAGE / "containers").glob("*.py")]
    texts = [path for path in files if path.is_file() and path.suffix not in {".sif", ".pyc"}]
    assert len(texts) > 10
    for path in texts:
        assert not ADDRESS.search(path.read_text()), path


@images
def test_a_lock_pins_every_requirement_with_a_hash(image: Image) -> None:
    locked = read_lock(image.lock_file(ROOT))
    wanted = pins(ROOT / image.requirements)
    assert wanted
    for name, version in wanted.items():
        assert name in locked, f"{name}: run `containers/lock {image.lock}`"
        assert locked[name].version.split("+")[0] == version, f"{name}: run `containers/lock {image.lock}`"


def test_locks_of_cpu_and_cuda_differ_in_torch_and_what_it_brings() -> None:
    cpu, cuda = (read_lock(IMAGES[name].lock_file(ROOT)) for name in ("mobie-cpu", "mobie-cuda"))
    assert cpu["torch"].version == cuda["torch"].version + "+cpu"
    assert cpu["torch"].sha256 != cuda["torch"].sha256
    for name in cpu.keys() - {"torch"}:
        assert cpu[name].version == cuda[name].version, name
        # a package that lies beside torch's file has that file's hash alone, not those of other systems
        assert cpu[name].sha256 <= cuda[name].sha256, name
    added = cuda.keys() - cpu.keys()
    assert added and all(name.startswith(("nvidia-", "cuda-")) for name in added), added


@pytest.mark.parametrize(
    "line",
    ["torch==2.13.0", "torch --hash=sha256:" + "0" * 64, "torch==2 --hash=sha256:12", "-r other.txt", "", "  "],
)
def test_a_lock_with_anything_but_pinned_hashes_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cpu.txt"
    path.write_text(f"# a comment\n{line}\n")
    with pytest.raises(DataError, match=r"cpu.txt: .*make the lock again"):
        read_lock(path)


# The tree digest


def make_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


NAMES = st.text(alphabet="ab.-_é\n ", min_size=1, max_size=5).filter(lambda name: name not in {".", ".."})
TREES = st.dictionaries(NAMES, st.binary(max_size=20), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(files=TREES, data=st.data())
def test_digest_is_of_names_modes_links_and_contents(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    base = tmp_path_factory.mktemp("trees")
    first = make_tree(base / "first", files)
    second = make_tree(base / "second", dict(reversed(files.items())))
    name = data.draw(st.sampled_from(sorted(files)))
    for path in second.iterdir():
        path.chmod((first / path.name).stat().st_mode & 0o7777)
        os.utime(path, (1, 1))  # times are not in it
    assert tree_digest(first) == tree_digest(second)
    target = second / name
    change = data.draw(st.sampled_from(["content", "name", "mode", "link", "folder", "absent", "new"]))
    match change:
        case "content":
            target.write_bytes(files[name] + b"x")
        case "name":
            target.rename(second / "another")
        case "mode":
            target.chmod(target.stat().st_mode ^ 0o100)
        case "link":
            target.rename(second / "kept") if data.draw(st.booleans()) else target.unlink()
            target.symlink_to("kept")
        case "folder":
            target.unlink()
            target.mkdir()
        case "absent":
            target.unlink()
        case "new":
            (second / "added").mkdir()
    assert tree_digest(first) != tree_digest(second), change


def test_digest_tells_link_targets_apart_and_follows_no_link(tmp_path: Path) -> None:
    trees = [make_tree(tmp_path / name, {"file": b"x"}) for name in "ab"]
    for tree, target in zip(trees, ("file", "fil"), strict=True):
        (tree / "link").symlink_to(target)
        (tree / "outside").symlink_to(tmp_path)
    assert tree_digest(trees[0]) != tree_digest(trees[1])
    assert not any(b"outside/" in line for line in tree_lines(trees[0]))


def test_digest_leaves_out_whole_paths_only(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"a/b/c": b"1", "a/bb": b"2"})
    names = [line.split(b"\0")[-1] for line in tree_lines(tree, ["a/b"])]
    assert names == [b"a", b"a/bb"]
    assert tree_digest(tree, ["a/b"]) == tree_digest(tree, ["a/b", "a/c"]) != tree_digest(tree)


def test_digest_refuses_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: neither file, folder nor link"):
        tree_digest(tmp_path)


# The build


def test_unknown_image_is_one_message() -> None:
    assert [image.name for image in chosen(("all", "code"), "cuda")] == ["mobie-cuda", "code"]
    with pytest.raises(ConfigError, match="unknown image 'mobi'; did you mean mobie"):
        chosen(("mobi",), "cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the files that a build reads, on a machine without Apptainer."""
    shutil.copytree(CONTAINERS, tmp_path / "containers", ignore=shutil.ignore_patterns("*.sif", "work"))
    return tmp_path


def options(root: Path) -> Options:
    return Options((), None, root / "work", False)


def test_a_missing_lock_names_the_command_that_makes_it(root: Path) -> None:
    image = IMAGES["mobie-cpu"]
    image.lock_file(root).unlink()
    with pytest.raises(DataError, match="make it with `containers/lock cpu`"):
        build(image, root, options(root), print)


def test_without_apptainer_nothing_begins(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(UnsupportedError, match="apptainer is not on PATH.*containers/get-apptainer PREFIX"):
        build(IMAGES["mobie-cpu"], root, options(root), print)
    assert not (root / "work").exists()


def test_without_mmdebstrap_the_remedy_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "find_apptainer", lambda: "apptainer")
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(UnsupportedError, match="mmdebstrap is not on PATH; install it.*--rootfs"):
        build(IMAGES["mobie-cpu"], root, options(root), print)


def test_a_step_that_fails_shows_its_last_lines_and_leaves_the_old_image(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = IMAGES["mobie-cpu"]
    image.sif(root).write_text("the old one")
    archive = root / "rootfs.tar"
    make_tree(root / "empty" / "var", {"lib": b""})
    subprocess.run(["tar", "-cf", archive, "-C", root / "empty", "."], check=True)
    program = root / "apptainer"
    program.write_text("#!/bin/sh\necho the index is away\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(build_module, "find_apptainer", lambda: str(program))
    with pytest.raises(DataError, match=r"ended with 3:\nthe index is away"):
        build(image, root, Options((), archive, root / "work", False), print)
    assert image.sif(root).read_text() == "the old one"


def test_mirrors_are_addresses_or_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert debian_sources(("MIRROR", "deb OTHER bookworm-security main")) == [
        "deb MIRROR bookworm main",
        "deb OTHER bookworm-security main",
    ]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="containers/build --mirror ADDRESS"):
        debian_sources(())


def test_litter_is_removed_and_the_rest_kept(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {"var/log/apt/history": b"", "var/cache/ldconfig/aux": b"", "etc/resolv.conf": b"here", "usr/bin/tool": b"x"},
    )
    clean(tree)
    assert not any((tree / "var" / "log").iterdir()) and not any((tree / "var" / "cache").iterdir())
    assert (tree / "etc" / "resolv.conf").read_bytes() == b""
    assert (tree / "usr" / "bin" / "tool").read_bytes() == b"x"


def test_a_root_file_system_is_unpacked_without_its_devices(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", {"dev/null": b"", "etc/passwd": b"root"})
    status = "Package: one\nStatus: ok\nVersion: 1.2-3\n\nPackage: two\nVersion: 4\nDescription: x\n"
    make_tree(source, {"var/lib/dpkg/status": status.encode()})
    subprocess.run(["tar", "-cf", tmp_path / "rootfs.tar", "-C", source, "."], check=True)
    unpack(tmp_path / "rootfs.tar", tmp_path / "tree")
    assert (tmp_path / "tree" / "etc" / "passwd").exists() and not (tmp_path / "tree" / "dev" / "null").exists()
    assert debian_packages(tmp_path / "tree") == {"one": "1.2-3", "two": "4"}


def test_pip_settings_come_from_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    wheels.mkdir()
    index.mkdir(parents=True)
    config = write_settings({"find-links": "elsewhere", "extra-index-url": index.as_uri()}, tmp_path / "pip.conf")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    found = pip_settings()
    assert found["find-links"] == str(wheels)
    assert found["extra-index-url"] == index.as_uri()
    assert set(local_folders(found)) == {wheels, index.parent}


def test_a_capability_that_the_machine_holds_back_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_capabilities("CapEff:\t0\nCapBnd:\t000001fffeffffff\n") == ["CAP_SYS_RESOURCE"]
    assert missing_capabilities("CapBnd:\t000001ffffffffff\n") == []
    assert apptainer_environment({"APPTAINER_DROP_CAPS": "mine"}) == {"APPTAINER_DROP_CAPS": "mine"}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert apptainer_environment({"A": "b"}) == {"A": "b"}


def test_digests_are_of_the_files_in_the_repository() -> None:
    digests = read_digests(ROOT)
    assert "mobie-cpu" in digests
    for name, values in digests.items():
        assert values["lock_sha256"] == file_hash(IMAGES[name].lock_file(ROOT)), f"{name}: build it again"
        assert values["definition_sha256"] == file_hash(IMAGES[name].definition(ROOT)), f"{name}: build it again"


# The workflow


def snakemake(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "-n", *arguments, "--", "results/table2.csv"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_a_missing_image_is_one_message_with_the_remedy(repository: Layout) -> None:
    shown = snakemake(repository.root, "--sdm", "apptainer")
    assert shown.returncode != 0
    assert "containers/mobie.sif is missing; build it with `containers/build`" in shown.stdout + shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr


def test_jobs_run_the_python_of_the_image_or_of_the_host(repository: Layout) -> None:
    if shutil.which("apptainer") is None:
        pytest.skip("needs Apptainer: Snakemake looks for it")
    image = repository.root / "containers" / "mobie.sif"
    image.parent.mkdir()
    image.touch()
    inside, outside = (snakemake(repository.root, *arguments) for arguments in (("--sdm", "apptainer"), ()))
    assert inside.returncode == outside.returncode == 0, inside.stdout + inside.stderr
    commands = [re.findall(r"\S*python\S* -m mobie", shown.stdout + shown.stderr) for shown in (inside, outside)]
    assert set(commands[0]) == {"python -m mobie"}
    assert set(commands[1]) == {f"{sys.executable} -m mobie"}


# Built images


@images
def test_an_image_passes_its_own_test(image: Image) -> None:
    if shutil.which("apptainer") is None or not image.sif(ROOT).is_file():
        pytest.skip("needs Apptainer and a built image (`containers/build all`)")
    environment = apptainer_environment()
    command = ["apptainer", "exec", "--bind", str(ROOT), "--pwd", str(ROOT), str(image.sif(ROOT))]
    shown = subprocess.run([*command, "cat", f"/{IDENTITY}"], env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    identity = json.loads(shown.stdout)
    if identity["name"] != image.name:
        pytest.skip(f"{image.sif(ROOT).name} is {identity['name']}")
    assert identity["tree_sha256"] == read_digests(ROOT)[image.name]["tree_sha256"]
    command[1] = "test"
    tested = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr
