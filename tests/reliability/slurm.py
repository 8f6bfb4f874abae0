"""A Slurm cluster of one node in a folder: Debian's programs, private keys, ports and state, nothing outside it."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mobie.errors import UnsupportedError

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
START_SECONDS = 60
#: of the node, whatever the machine has: jobs of the paper suite are to be accepted, none is to run
DECLARED_MB = 400_000

MUNGE_FILES = {
    "key-file": "munge.key",
    "socket": "munge.socket",
    "pid-file": "munged.pid",
    "log-file": "munged.own.log",
    "seed-file": "munged.seed",
}

CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MinJobAge=7200
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Job:
    """What `squeue` says of a job: comment names its rule and wildcards, memory in MiB, limit in minutes."""

    number: str
    state: str
    comment: str
    mem_mb: int
    minutes: int


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `environment` is for whoever calls its commands."""

    folder: Path
    environment: dict[str, str]

    def command(self, *arguments: str) -> str:
        """Output of a command of Slurm."""
        shown = subprocess.run(arguments, env=self.environment, capture_output=True, text=True, check=True, timeout=60)
        return shown.stdout

    def jobs(self) -> list[Job]:
        """All jobs since the start, in the order they were submitted."""
        lines = self.command("squeue", "--states=all", "--noheader", "--sort=i", "--format=%i|%T|%k|%m|%l").splitlines()
        fields = [line.strip().split("|") for line in lines]
        return [
            Job(number, state, comment, _mib(memory), _minutes(limit))
            for number, state, comment, memory, limit in fields
        ]

    @property
    def version(self) -> str:
        return self.command("sbatch", "--version").strip()


def _mib(shown: str) -> int:
    """`2500M` or `39000M` → MiB; Slurm shortens whole gibibytes to `4G`."""
    return round(float(shown[:-1]) * {"M": 1, "G": 1024, "T": 1024**2}[shown[-1]])


def _minutes(shown: str) -> int:
    """`8:00`, `1:02:00`, `1-01:00:00` → minutes."""
    days, _, clock = shown.rpartition("-")
    *hours, minutes, _ = map(int, clock.split(":"))
    return int(days or 0) * 1440 + sum(hours) * 60 + minutes


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that are not on PATH."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def _write_configuration(folder: Path) -> None:
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    controller_port, node_port = _free_ports(2)
    values = {"user": getpass.getuser(), "folder": folder, "controller_port": controller_port, "node_port": node_port}
    (folder / "slurm.conf").write_text(CONFIG.format(**values, cpus=os.cpu_count(), memory=DECLARED_MB))
    (folder / "gres.conf").write_text("NodeName=localhost Name=gpu File=/dev/null\n")
    first = Path("/sys/fs/cgroup/freezer").is_dir()  # cgroups of version 1
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n" if first else "IgnoreSystemd=yes\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    # The job-step plug-in takes SLURM_CONF out of the environment of the srun that it starts.
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF="{folder}/slurm.conf" exec {shutil.which("srun", path=_path())} "$@"\n')
    srun.chmod(0o755)


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start munge, the controller and a node in an empty folder with a short path; end them at the end.

    Raises:
        UnsupportedError: a program is missing, or the node does not come up here; the message holds the end of its log.
    """
    if missing := missing_programs():
        raise UnsupportedError(
            f"no {', '.join(missing)} here, expected the programs of Slurm and munge; on Debian: "
            "apt install slurm-wlm munge"
        )
    folder = folder.resolve()
    folder.chmod(0o755)
    _write_configuration(folder)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{_path()}"}
    cluster = Cluster(folder, environment)
    munge = [f"--{name}={folder}/{file}" for name, file in MUNGE_FILES.items()]
    commands = {
        "munged": ["munged", "--foreground", "--force", *munge],
        "slurmctld": ["slurmctld", "-D"],
        "slurmd": ["slurmd", "-D", "-N", "localhost"],
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        _wait_until_idle(cluster, started)
        try:
            yield cluster
        finally:
            cluster.command("scancel", "--state=PENDING", "--user", getpass.getuser())
            cluster.command("scancel", "--state=RUNNING", "--user", getpass.getuser())
            time.sleep(1)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            process.wait(timeout=60)


def _wait_until_idle(cluster: Cluster, started: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the node. Raises `UnsupportedError` with the end of its log where it does not come."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and all(process.poll() is None for process in started):
        try:
            if cluster.command("sinfo", "--noheader", "--format=%t").strip() == "idle":
                return
        except subprocess.CalledProcessError:
            pass  # the controller is not there yet
        time.sleep(0.5)
    logs = {name: (cluster.folder / f"{name}.log").read_text().splitlines()[-3:] for name in ("slurmctld", "slurmd")}
    raise UnsupportedError(f"the cluster did not come up in {START_SECONDS} s; ends of its logs: {logs}")
