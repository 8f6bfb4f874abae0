"""Builds an image: Debian root file system → packages from a lock → digest of the tree → one file.

The root file system is made by mmdebstrap and everything in the definition comes from files of the repository, so two
builds from the same Debian packages give the same tree. The order of the steps matters once: the identity file can be
written only when the digest is known, so it is left out of the digest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mobie.containers.apptainer import apptainer_environment, find_apptainer
from mobie.containers.images import IDENTITY, RELEASE, SOURCE_DATE_EPOCH, Image, read_digests, write_digests
from mobie.containers.lock import read_lock
from mobie.containers.pip_settings import local_folders, pip_settings, write_settings
from mobie.containers.tree import tree_digest
from mobie.errors import ConfigError, DataError, UnsupportedError
from mobie.provenance import file_hash, git_commit
from mobie.storage import storage_errors, write_json, write_text

#: what differs between two builds or machines and decides nothing; removed before the digest is taken
LITTER = ("var/log", "var/cache", "tmp", "var/tmp", "root/.cache", "var/lib/apt/lists", "mnt", "run")
#: written by this machine's tools with its own names in them; emptied, at run time Apptainer binds the host's
HOST_FILES = ("etc/resolv.conf", "etc/hosts", "etc/hostname", "etc/apt/sources.list", "etc/machine-id")
#: Apptainer's own files: the time of the build, paths of this machine, and scripts of its version
_APPTAINER: tuple[str, ...] = ("actions", "libs", "startscript", "labels.json", "Singularity", "runscript.help")
_APPTAINER += tuple(f"env/{name}.sh" for name in ("01-base", "94-appsbase", "95-apps", "99-base", "99-runtimevars"))
LEFT_OUT = (str(IDENTITY), *(f".singularity.d/{name}" for name in _APPTAINER))

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to build.

    mirrors: where Debian comes from, each an address or a line of sources.list; empty: what apt is configured with here
    rootfs: a root file system made before, instead of a new one
    work: folder for the trees, a few times as large as the image
    keep: leave `work` behind
    """

    mirrors: tuple[str, ...]
    rootfs: Path | None
    work: Path
    keep: bool


@dataclass(frozen=True)
class Built:
    """What a build gave; digests are SHA-256 in hexadecimal."""

    tree_sha256: str
    lock_sha256: str
    rootfs_sha256: str
    definition_sha256: str
    debian: dict[str, str]  # package → version


def run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program and return what it printed. Raises `DataError` with its last lines when it fails."""
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-25:])
        raise DataError(f"{' '.join(command)}\nended with {done.returncode}:\n{last}")
    return done.stdout


def debian_sources(mirrors: tuple[str, ...]) -> list[str]:
    """Lines of sources.list for the images' release.

    Raises:
        ConfigError: no mirror was given and this machine's apt is configured with none of that release.
    """
    if mirrors:
        return [text if text.startswith("deb ") else f"deb {text} {RELEASE} main" for text in mirrors]
    listed = ""
    if shutil.which("apt-get"):
        columns = "$(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)"
        listed = run(["apt-get", "indextargets", "--format", columns, "Created-By: Packages"])
    found = re.findall(rf"^Debian (\S+ {RELEASE}\S* main)$", listed, re.MULTILINE)
    if not found:
        raise ConfigError(
            f"apt is not configured with Debian {RELEASE} here; name a mirror: `containers/build --mirror ADDRESS`, "
            "for a fixed day that of a snapshot"
        )
    return [f"deb {line}" for line in dict.fromkeys(found)]


def make_rootfs(image: Image, options: Options, target: Path) -> None:
    """Write a Debian root file system as a tar archive, the same one for the same packages."""
    program = shutil.which("mmdebstrap")
    if program is None:
        raise UnsupportedError(
            "mmdebstrap is not on PATH; install it (`apt install mmdebstrap`, or your system's package), or give a "
            "root file system made elsewhere with --rootfs"
        )
    command = [program, "--variant=minbase", f"--include={','.join(image.debian)}", RELEASE, str(target)]
    run(command + debian_sources(options.mirrors), os.environ | {"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)})


def debian_packages(tree: Path) -> dict[str, str]:
    """Package → version, from the package manager's own list inside a tree."""
    status = (tree / "var" / "lib" / "dpkg" / "status").read_text(encoding="utf-8")
    return dict(re.findall(r"^Package: (\S+)\n(?:.+\n)*?Version: (\S+)$", status, re.MULTILINE))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a root file system, without its devices: Apptainer brings those, and only root may make them."""
    folder.mkdir(parents=True)
    run(["tar", "--extract", "--preserve-permissions", "--exclude=./dev/*", "-f", str(archive), "-C", str(folder)])


def prepare_pip(tree: Path, work: Path) -> list[str]:
    """Let pip inside the build see what pip sees here. Returns the binds, as `SOURCE:TARGET`.

    Mount points are made in the tree; they are empty afterwards and removed with the other litter.
    """
    settings = pip_settings()
    shared = work / "pip"
    (shared / "cache").mkdir(parents=True, exist_ok=True)
    binds = [f"{shared}:/mnt"]
    for folder in local_folders(settings):
        (tree / folder.relative_to("/")).mkdir(parents=True, exist_ok=True)
        binds.append(f"{folder}:{folder}:ro")
    if "cert" in settings:
        shutil.copy(settings["cert"], shared / "cert.pem")
        settings["cert"] = "/mnt/cert.pem"
    write_settings(settings | {"cache-dir": "/mnt/cache", "disable-pip-version-check": "true"}, shared / "pip.conf")
    return binds


def install(image: Image, root: Path, rootfs: Path, work: Path) -> Path:
    """Run the definition on an unpacked root file system and return the tree it gives."""
    tree = work / "tree"
    arguments = {
        "rootfs": str(rootfs),
        "lock": str(image.lock_file(root)),
        "lock_sha256": file_hash(image.lock_file(root)),
        "commit": git_commit(root) or "unknown",
        "epoch": str(SOURCE_DATE_EPOCH),
    }
    command = [find_apptainer(), "build", "--sandbox", "--notest", "--force"]
    command += [] if os.geteuid() == 0 else ["--fakeroot"]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    for bind in prepare_pip(rootfs, work):
        command += ["--bind", bind]
    outside = {name: value for name, value in os.environ.items() if not re.match("PIP_|SSL_|REQUESTS_|CURL_", name)}
    run(
        [*command, str(tree), str(image.definition(root))],
        apptainer_environment(outside | {"APPTAINER_TMPDIR": str(work)}),
    )
    return tree


def clean(tree: Path) -> None:
    """Remove what two builds or two machines would differ in."""
    for name in LITTER:
        folder = tree / name
        for path in folder.iterdir() if folder.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in (tree / name for name in HOST_FILES):
        if path.parent.is_dir():
            path.unlink(missing_ok=True)
            path.touch(mode=0o644)
    for folder in local_folders(pip_settings()):
        _remove_empty(tree / folder.relative_to("/"), tree)


def _remove_empty(folder: Path, above: Path) -> None:
    """Remove a folder and its parents below `above` as long as they are empty."""
    while folder != above and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def pack(tree: Path, target: Path) -> None:
    """Make one file of a tree; zstd, since gzip takes minutes longer for a tenth less."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        arguments = ["--mksquashfs-args", "-comp zstd -Xcompression-level 3"]
        command = [find_apptainer(), "build", "--force", *arguments, str(temporary), str(tree)]
        run(command, apptainer_environment() | {"APPTAINER_TMPDIR": str(tree.parent)})
        with storage_errors(target):
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _step(say: Say, name: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    say(f"{name} …")
    began = time.monotonic()
    yield
    say(f"  {time.monotonic() - began:.0f} s")


def build_tree(image: Image, root: Path, options: Options, say: Say) -> tuple[Path, Built]:
    """Build an image's tree, cleaned and with its digest, but not packed.

    Raises:
        DataError: there is no lock, or a step failed.
        UnsupportedError: a program is missing.
    """
    read_lock(image.lock_file(root))  # these two before anything that takes minutes
    find_apptainer()
    lock, definition = file_hash(image.lock_file(root)), file_hash(image.definition(root))  # as they are used now
    work = options.work / image.name
    if work.exists():
        run(["chmod", "-R", "u+rwX", str(work)])
        shutil.rmtree(work)
    work.mkdir(parents=True)
    archive, rootfs = options.rootfs or work / "rootfs.tar", work / "rootfs"
    if options.rootfs is None:
        with _step(say, f"{image.name}: Debian {RELEASE} with {len(image.debian)} packages and what they need"):
            make_rootfs(image, options, archive)
    with _step(say, f"{image.name}: Python packages of {image.lock_file(root).relative_to(root)}"):
        unpack(archive, rootfs)
        tree = install(image, root, rootfs, work)
    shutil.rmtree(rootfs)
    clean(tree)
    with _step(say, f"{image.name}: digest of the tree"):
        digest = tree_digest(tree, LEFT_OUT)
    return tree, Built(digest, lock, file_hash(archive), definition, debian_packages(tree))


def build(image: Image, root: Path, options: Options, say: Say) -> Built:
    """Build an image, write its identity into it and its digests beside it. Raises as `build_tree`."""
    before = _debian_before(image, root)
    tree, built = build_tree(image, root, options, say)
    identity = {"name": image.name, "tree_sha256": built.tree_sha256, "lock_sha256": built.lock_sha256}
    write_json(tree / IDENTITY, identity | {"commit": git_commit(root)})
    with _step(say, f"{image.name}: {image.sif(root).relative_to(root)}"):
        pack(tree, image.sif(root))
    if not options.keep:
        shutil.rmtree(options.work / image.name)
    say(_compared(image, root, built, before))
    lines = [f"{name}={version}" for name, version in sorted(built.debian.items())]
    write_text(image.debian_file(root), "\n".join([*lines, ""]))
    parts = ("tree_sha256", "lock_sha256", "rootfs_sha256", "definition_sha256")
    write_digests(root, image, {name: getattr(built, name) for name in parts})
    return built


def _debian_before(image: Image, root: Path) -> dict[str, str]:
    """Debian packages of the build before this one."""
    path = image.debian_file(root)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(line.split("=", 1) for line in lines)


def _compared(image: Image, root: Path, built: Built, before: dict[str, str]) -> str:
    """One message: is this the tree of digests.json, and if not, why."""
    known = read_digests(root).get(image.name)
    if known is None:
        return f"{image.name}: tree {built.tree_sha256} (the first build)"
    if known["tree_sha256"] == built.tree_sha256:
        return f"{image.name}: tree {built.tree_sha256}, as in containers/digests.json"
    reasons = [name for name in ("lock", "definition") if known[f"{name}_sha256"] != getattr(built, f"{name}_sha256")]
    reasons += [
        f"{name} {before.get(name, 'absent')} → {built.debian.get(name, 'absent')}"
        for name in sorted(before.keys() | built.debian.keys())
        if before.get(name) != built.debian.get(name)
    ]
    what = "; ".join(reasons) or "neither the lock, the definition nor a Debian package: the build is not reproducible"
    return f"{image.name}: tree {built.tree_sha256}, was {known['tree_sha256']}; changed: {what}"
