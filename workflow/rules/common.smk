# What every rule needs: the suite's configuration, paths relative to the repository, and when a result is stale.
# Nothing here imports torch: `snakemake -n` is to take a second or two.
import os
import sys
from functools import wraps
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from snakemake.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import DeploymentMethod

from mobie.config import load_suite
from mobie.containers.apptainer import apptainer_environment, bound
from mobie.errors import MobieError
from mobie.fetching.mirror import lacks, mirror_folder
from mobie.jobs import needs, stale
from mobie.jobs.cost import estimate
from mobie.jobs.fetch import missing_in_mirror, repository_of
from mobie.jobs.keys import Keys
from mobie.jobs.score import REFERENCE
from mobie.lock import locked_entry
from mobie.paths import Layout
from mobie.provenance import digest
from mobie.sources import load_sources

PATHS = Layout(Path())  # relative: Snakemake runs in the repository
HOST_MOBIE = f"{sys.executable} -m mobie"  # in rules with `container: None`
IMAGE = "containers/mobie.sif"  # relative: another folder's copy of the repository does not make results stale
IN_IMAGE = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method
MOBIE = "python -m mobie" if IN_IMAGE else HOST_MOBIE  # the image's own Python, or this one
SUITE = config.get("suite", "smoke")

if IN_IMAGE:
    if not Path(IMAGE).exists():
        raise WorkflowError(
            f"{IMAGE} is missing; build it with `containers/build` (`--cuda` for NVIDIA GPUs), or leave out "
            "`--sdm apptainer` to run the jobs in this environment"
        )
    os.environ.update(apptainer_environment())


container: IMAGE


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
def model_inputs(wildcards):
    """Files that stand for a full-precision model."""
    return needs.model_inputs(keys_of(wildcards))


@user_error
def text_source(text):
    """File or folder that a text is read from."""
    return needs.text_source(text, PATHS)


def memory(kind):
    """MiB that a job of a kind asks for, more at each attempt."""

    @user_error
    def mem_mb(wildcards, attempt):
        return estimate(kind, keys_of(wildcards), attempt).mem_mb

    return mem_mb


def minutes(kind):
    """Wall time that a job of a kind asks for, more at each attempt."""

    @user_error
    def runtime(wildcards, attempt):
        return estimate(kind, keys_of(wildcards), attempt).minutes

    return runtime


@user_error
def gpus(wildcards):
    """GPUs that a job with a model asks for."""
    return keys_of(wildcards).model_config.resources.gpu


MODELS = user_error(needs.chosen_models)(config.get("models"), PATHS)  # `--config models=A,B`: records of these alone
GATE = 100  # priority of the protocol gate


def priority_of_gate(wildcards):
    """What the gate reads, the scores in full precision, goes before the other methods of all models."""
    return GATE if wildcards.method == REFERENCE else 0


SOURCES = user_error(load_sources)(PATHS.sources)
user_error(load_suite)(SUITE, PATHS)  # names checked before anything else
