# Programs that a model writes, and what becomes of them. Two jobs: writing needs the model (a GPU, where it is large);
# running starts a container of its own and reads nothing of the model.
from mobie.jobs.code import sandbox_state

ASKED = str(config.get("unsandboxed", False)).lower()  # from the command line `true` comes as a word
if ASKED not in ("true", "false"):
    raise WorkflowError(f"--config unsandboxed={ASKED}: expected true or false")
UNSANDBOXED = ASKED == "true"


@user_error
def problem_files(wildcards):
    """Downloads that hold the problems."""
    return needs.problem_files(keys_of(wildcards))


@user_error
def code_samples_state(wildcards):
    """Code and protocol of the programs, and whether the model is asked through its chat template."""
    keys = keys_of(wildcards)
    return digest([stale.code_samples_code(), keys.protocol.code.generation(), keys.model_config.chat])


SANDBOX = user_error(sandbox_state)(PATHS, UNSANDBOXED)


@user_error
def code_state(wildcards):
    """Code and protocol of the verdicts, and what programs run in: they are judged again once there is a container."""
    return digest([stale.code_code(), keys_of(wildcards).protocol.code.model_dump(mode="json"), SANDBOX])


# The record alone is declared: it holds the hashes of the programs in code_samples/.
rule generate_code:
    input:
        PATHS.record("{suite}", "{model}", "{method}", "{seed}", "quantize"),
        problem_files,
    output:
        PATHS.record("{suite}", "{model}", "{method}", "{seed}", "code_samples"),
    log:
        PATHS.log("{suite}", "{model}", "{method}", "s{seed}", "code_samples"),
    benchmark:
        PATHS.benchmark("{suite}", "{model}", "{method}", "s{seed}", "code_samples")
    threads: 1
    resources:
        mem_mb=memory("code_samples"),
        runtime=minutes("code_samples"),
        gpu=gpus,
    params:
        stale=code_samples_state,
    shell:
        "{MOBIE} generate-code --suite {wildcards.suite} --model {wildcards.model}"
        " --method {wildcards.method} --seed {wildcards.seed} > {log} 2>&1"


rule score_code:
    input:
        PATHS.record("{suite}", "{model}", "{method}", "{seed}", "code_samples"),
        problem_files,
    output:
        PATHS.record("{suite}", "{model}", "{method}", "{seed}", "code"),
    log:
        PATHS.log("{suite}", "{model}", "{method}", "s{seed}", "code"),
    benchmark:
        PATHS.benchmark("{suite}", "{model}", "{method}", "s{seed}", "code")
    container:
        None
    threads: 1
    resources:
        mem_mb=memory("code"),
        runtime=minutes("code"),
    params:
        stale=code_state,
        unsandboxed="--unsandboxed" if UNSANDBOXED else "",
    shell:
        "{HOST_MOBIE} score-code --suite {wildcards.suite} --model {wildcards.model}"
        " --method {wildcards.method} --seed {wildcards.seed} {params.unsandboxed} > {log} 2>&1"
