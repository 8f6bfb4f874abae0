# Scores of a stored checkpoint. The record of its quantization stands for the checkpoint.
def score_inputs(kind):
    """What a kind of score reads, as a function of the wildcards."""

    @user_error
    def inputs(wildcards):
        keys = keys_of(wildcards)
        found = [keys.record("quantize")]
        if kind == "tasks":
            sources = benchmark_sources(keys)
            return found + ([PATHS.mirror_stamp] if uses_mirror(sources) else [PATHS.source(s) for s in sources])
        if kind == "routing":
            found.append(PATHS.record(keys.suite, keys.model, REFERENCE, keys.seed, "quantize"))
            texts = (keys.protocol.routing.text,)
        else:
            texts = keys.protocol.texts
        return found + list(dict.fromkeys(text_source(text) for text in texts))

    return inputs


def score_state(kind):
    """Code and protocol of a kind of score: a change in any of them makes the record stale."""

    @user_error
    def state(wildcards):
        protocol = keys_of(wildcards).protocol.model_dump(mode="json")[kind]
        return digest([stale.score_code(kind), protocol])

    return state


for kind in ("perplexity", "tasks", "routing"):

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
        threads: 1
        resources:
            mem_mb=lambda wildcards: keys_of(wildcards).model_config.resources.mem_mb,
            gpu=lambda wildcards: keys_of(wildcards).model_config.resources.gpu,
        params:
            stale=score_state(kind),
            kind=kind,
        shell:
            "{MOBIE} score-{params.kind} --suite {wildcards.suite} --model {wildcards.model}"
            " --method {wildcards.method} --seed {wildcards.seed} > {log} 2>&1"
