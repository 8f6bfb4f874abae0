# The paper's printed numbers against each other: a second, no model and no torch.
from mobie.paths import PACKAGE
from mobie.provenance import code_hash, file_hash


localrules:
    audit,


PAPER_FILES = sorted(path for path in (PACKAGE / "paper").rglob("*") if path.suffix in {".csv", ".yaml"})


rule audit:
    output:
        json=PATHS.table("audit", "json"),
        md=PATHS.table("audit", "md"),
    log:
        PATHS.log("audit"),
    threads: 1
    params:
        stale=digest([code_hash(["mobie.paper.audit.command"]), [file_hash(path) for path in PAPER_FILES]]),
    shell:
        "{MOBIE} audit --save {output.json} --save {output.md} > {log} 2>&1"
