# Tables: records in, files out; seconds, no model.
localrules:
    table2,


@user_error
def table2_state():
    """Code, rows and labels: a change in any of them makes the table stale."""
    suite = SUITE_KEYS[0].suite_config.digest()
    parts = [part for keys in SUITE_KEYS for part in (keys.method_config.digest(), keys.model_config.digest())]
    return digest([stale.table2_code(), suite, parts])


rule table2:
    input:
        [keys.record(kind) for keys in SUITE_KEYS for kind in KINDS],
    output:
        PATHS.table("table2", "csv"),
        PATHS.table("table2", "md"),
        PATHS.table("table2", "long.csv"),
    log:
        PATHS.log("table2"),
    threads: 1
    params:
        suite=SUITE,
        stale=table2_state(),
    shell:
        "{MOBIE} table2 --suite {params.suite} > {log} 2>&1"
