"""A real Slurm of two virtual nodes on this host: munge, one controller and two node daemons in one directory."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired, by default two minutes.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 RealMemory=4000
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=preemptible Nodes=ALL PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [program for program in PROGRAMS if _find(program) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


@contextmanager
def running(directory: Path) -> Iterator[Path]:
    """Run the cluster in `directory` and give the configuration file, for SLURM_CONF; ends every daemon."""
    configuration = directory / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            directory=directory,
            ports=_free_ports(3),
        )
    )
    (directory / "state").mkdir()
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    socket_path = f"--socket={directory}/munge.socket"
    munge_files = [f"--{name}-file={directory}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", socket_path, *munge_files]
    daemons = [_start(munged, directory)]
    try:
        _wait(lambda: (directory / "munge.socket").exists(), "munged", directory)
        daemons.append(_start(["slurmctld", "-D", "-f", str(configuration)], directory))
        daemons += [_start(["slurmd", "-D", "-f", str(configuration), "-N", node], directory) for node in ("n1", "n2")]
        _wait(lambda: _idle_nodes(configuration) == 2, "slurmctld, slurmd", directory)
        yield configuration
    finally:
        _end_jobs(configuration)
        for daemon in reversed(daemons):  # munged, which signs what the others say, last
            _end(daemon)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin")


def _end_jobs(configuration: Path, *, timeout: float = 60) -> None:
    """What runs outlives its node's daemon. Takes KillWait when a process does not end by itself."""
    _command(configuration, "scancel", "--user=root")
    deadline = time.monotonic() + timeout
    while _command(configuration, "squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.2)


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _start(command: list[str], directory: Path) -> "subprocess.Popen[bytes]":
    path = _find(command[0])
    assert path is not None
    with (directory / f"{command[0]}-{command[-1].rpartition('/')[2]}.out").open("ab") as output:
        return subprocess.Popen(
            [path, *command[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=directory
        )


def _command(configuration: Path, *words: str) -> str:
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60).stdout


def _idle_nodes(configuration: Path) -> int:
    shown = _command(configuration, "sinfo", "--Node", "--noheader", "--partition=normal", "--states=idle")
    return len(shown.splitlines())


def _logs(directory: Path) -> str:
    files = sorted(path for path in directory.iterdir() if path.suffix in (".log", ".out"))
    return "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in files)


def _wait(condition: Callable[[], bool], what: str, directory: Path, *, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not start\n{_logs(directory)}"
        time.sleep(0.2)
