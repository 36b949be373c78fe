"""What Slurm says about jobs: the driver waits by it, bridge.status shows it. Costs no torch and no submitit."""

import shutil
import subprocess
from collections.abc import Iterable

WAITING = frozenset(
    ["PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED"]
)
WORKING = frozenset(["RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"])
UNFINISHED = WAITING | WORKING | {"UNKNOWN"}
"""States that another can follow. PREEMPTED is not among them: a job that is requeued turns PENDING."""
GONE = "gone from the queue"
TIMEOUT = 20  # seconds; a controller that is down answers late or never


def states(job_ids: Iterable[str]) -> dict[str, str] | None:
    """State of every job by its id, `GONE` for one that Slurm no longer knows; None when Slurm does not answer now.

    squeue forgets an ended job after minutes (MinJobAge), sacct remembers it where accounting is kept. What squeue
    says goes before: sacct's answer for a requeued job can be its earlier end.
    """
    wanted = list(job_ids)
    jobs = ["-j", ",".join(wanted)]
    known = _answer(["squeue", "-h", "-t", "all", "-o", "%i|%T", *jobs], unknown="Invalid job id")
    if known is None:
        return None
    if not known.keys() >= set(wanted):
        known = (_answer(["sacct", "-X", "-n", "-P", "-o", "JobID,State", *jobs]) or {}) | known
    return {job: known.get(job, GONE) for job in wanted}


def _answer(command: list[str], *, unknown: str = "") -> dict[str, str] | None:
    """State by job id, of lines `id|state ...`; None without the program or when it fails.

    unknown: what it prints when it fails only for knowing none of the jobs.
    """
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and not (unknown and unknown in done.stderr):
        return None
    rows = (line.partition("|") for line in done.stdout.splitlines())
    return {job: state.split()[0] for job, _, state in rows if state.strip()}  # "CANCELLED by 0"
