# Scores of a stored checkpoint. The record of its quantization stands for the checkpoint.
rule windows:
    input:
        model=model_inputs,
        text=lambda wildcards: text_source(wildcards.text),
    output:
        PATHS.windows("{suite}", "{model}", "{text}", "{protocol}"),
    log:
        PATHS.log("{suite}", "{model}", "windows-{text}-{protocol}"),
    wildcard_constraints:
        protocol=r"[0-9a-f]+",
    threads: 1
    resources:
        mem_mb=memory("windows"),
        runtime=minutes("windows"),
    params:
        code=stale.windows_code(),
    shell:
        "{MOBIE} windows --suite {wildcards.suite} --model {wildcards.model} --text {wildcards.text}"
        " --protocol {wildcards.protocol} > {log} 2>&1"


def score_inputs(kind):
    """What a kind of score reads, as a function of the wildcards."""

    @user_error
    def inputs(wildcards):
        return needs.score_inputs(keys_of(wildcards), kind)

    return inputs


def score_state(kind):
    """Code and protocol of a kind of score: a change in any of them makes the record stale."""

    @user_error
    def state(wildcards):
        protocol = keys_of(wildcards).protocol.model_dump(mode="json")[kind]
        return digest([stale.score_code(kind), protocol])

    return state


for kind in stale.SCORERS:

    rule:
        name:
            f"score_{kind}"
        input:
            score_inputs(kind),
        output:
            PATHS.record("{suite}", "{model}", "{method}", "{seed}", kind),
        log:
            PATHS.log("{suite}", "{model}", "{method}", "s{seed}", kind),
        benchmark:
            PATHS.benchmark("{suite}", "{model}", "{method}", "s{seed}", kind)
        priority: priority_of_gate if kind == "tasks" else 0
        threads: 1
        resources:
            mem_mb=memory(kind),
            runtime=minutes(kind),
            gpu=gpus,
        params:
            stale=score_state(kind),
            kind=kind,
        shell:
            "{MOBIE} score-{params.kind} --suite {wildcards.suite} --model {wildcards.model}"
            " --method {wildcards.method} --seed {wildcards.seed} > {log} 2>&1"
