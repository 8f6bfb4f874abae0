"""The command lines of `containers/build` and `containers/lock`."""

from __future__ import annotations

from pathlib import Path

import click

from mobie.containers.apptainer import apptainer_environment, find_apptainer
from mobie.containers.build import Options, build, run
from mobie.containers.images import IMAGES, VARIANTS, Image, chosen
from mobie.containers.lock import make_lock, read_lock
from mobie.errors import MobieError
from mobie.paths import find_root


@click.command(name="containers/build", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[mobie|code|all]...")
@click.option("--cuda", is_flag=True, help="Build mobie with the CUDA build of torch (10 GB; runs on a CPU too).")
@click.option(
    "--mirror",
    "mirrors",
    multiple=True,
    help="Debian mirror: an address, or a whole line `deb ADDRESS SUITE main`.  [default: what apt uses here]",
)
@click.option(
    "--rootfs",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Use this root file system (.tar) and make none; no Debian mirror is needed then.",
)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the trees.  [default: containers/work]")
@click.option("--keep", is_flag=True, help="Leave the trees in the work folder.")
@click.option("--no-test", is_flag=True, help="Do not run the image's own test after the build.")
def build_command(
    names: tuple[str, ...],
    cuda: bool,
    mirrors: tuple[str, ...],
    rootfs: Path | None,
    work: Path | None,
    keep: bool,
    no_test: bool,
) -> None:
    """Build Apptainer images: `mobie` runs the suite, `code` executes generated programs.

    \b
    containers/build                   mobie for the CPU → containers/mobie.sif
    containers/build --cuda            mobie for NVIDIA GPUs → containers/mobie.sif
    containers/build code              → containers/code.sif
    containers/build all --mirror ADDRESS-OF-A-SNAPSHOT

    As root or as a user; a user needs the kernel's user namespaces and lines in /etc/subuid and /etc/subgid. Wanted on
    PATH: apptainer (on Debian 12: `containers/get-apptainer PREFIX`) and mmdebstrap. Python packages come from where
    pip finds them here, and each has to have the hash that the lock in containers/locks/ says.

    The digest of the tree inside the image is printed and written to containers/digests.json, the Debian packages with
    their versions to containers/locks/debian-*.txt; git shows what changed. The same packages give the same digest; a
    mirror that moves on gives other packages, a snapshot does not.

    Then: snakemake --sdm apptainer --cores all results/table2.csv
    """
    root = find_root()
    options = Options(mirrors, rootfs, (work or root / "containers" / "work").resolve(), keep)
    for image in chosen(names or ("mobie",), VARIANTS[cuda]):
        build(image, root, options, click.echo)
        click.echo(f"{image.name}: {image.sif(root)}, {image.sif(root).stat().st_size / 1e9:.2f} GB")
        if not no_test:
            test_image(image, root)
            click.echo(f"{image.name}: its test passes")


def test_image(image: Image, root: Path) -> None:
    """Run an image's own test in the repository. Raises `DataError` with what it printed."""
    command = [find_apptainer(), "test", "--bind", str(root), "--pwd", str(root), str(image.sif(root))]
    run(command, apptainer_environment())


@click.command(name="containers/lock", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[cpu|cuda|code]...")
def lock_command(names: tuple[str, ...]) -> None:
    """Resolve the Python packages of the images again and write containers/locks/{cpu,cuda,code}.txt.

    \b
    containers/lock                    all three, after a change of requirements.txt
    containers/lock cpu

    uv resolves them (`pip install uv`), from the indexes and folders that pip is configured with here. For `cpu` there
    has to be a CPU build of torch (a folder: PIP_FIND_LINKS, or an index of such builds: PIP_EXTRA_INDEX_URL); for
    `cuda` the main index alone is asked. A lock holds names, versions and hashes, and no address.
    """
    root = find_root()
    locks = {image.lock: image for image in IMAGES.values()}
    for name in names or locks:
        if name not in locks:
            raise click.UsageError(f"unknown lock {name!r}; known: {', '.join(locks)}")
        path = make_lock(locks[name], root)
        click.echo(f"{path}: {len(read_lock(path))} packages")


def shown(command: click.Command) -> None:
    """Run a command; a mistake of the user's is one message and status 1."""
    try:
        command()
    except MobieError as error:
        raise SystemExit(f"Error: {error}") from None
