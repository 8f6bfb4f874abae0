# What every rule needs: the suite's configuration, paths relative to the repository, and when a result is stale.
# Nothing here imports torch: `snakemake -n` is to take a second or two.
import sys
from functools import wraps
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from snakemake.exceptions import WorkflowError

from mobie.config import load_suite
from mobie.data.texts import TEXTS
from mobie.errors import MobieError
from mobie.jobs import stale
from mobie.jobs.keys import Keys, find_source, model_files
from mobie.jobs.score import REFERENCE, benchmark_sources, hard_sources, uses_mirror
from mobie.paths import Layout
from mobie.provenance import digest
from mobie.sources import load_sources

PATHS = Layout(Path())  # relative: Snakemake runs in the repository
MOBIE = f"{sys.executable} -m mobie"
SUITE = config.get("suite", "smoke")


wildcard_constraints:
    suite=r"[^/]+",
    model=r"[^/]+",
    method=r"[^/]+",
    seed=r"\d+",


def user_error(function):
    """Show a mistake in the configuration as one message, without a traceback."""

    @wraps(function)  # Snakemake looks at the signature
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except MobieError as error:
            raise WorkflowError(str(error)) from None

    return guarded


@user_error
def keys_of(wildcards):
    """The keys that a job's file names carry."""
    return Keys(PATHS, wildcards.suite, wildcards.model, int(wildcards.get("seed", 0)), wildcards.get("method", ""))


@user_error
def text_source(text):
    """File or folder that a text is read from."""
    if text not in TEXTS:
        raise WorkflowError(f"unknown text {text!r}; known: {', '.join(TEXTS)}")
    return PATHS.source(find_source(TEXTS[text].source, PATHS))


SOURCES = user_error(load_sources)(PATHS.sources)
user_error(load_suite)(SUITE, PATHS)  # names checked before anything else
