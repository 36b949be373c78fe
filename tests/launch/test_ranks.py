"""Which rank a process is, from the variables that srun and submitit set; keys about how a run is started."""

import pytest

from bridge.launch import ranks
from tests.launch.commands import TINY, train

# As srun (Slurm 22.05) sets them for task 5 of `srun --nodes=3 --ntasks=7`.
OF_SRUN = {
    "SLURM_JOB_ID": "25003",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)",
    "SLURM_STEP_NODELIST": "localhost,gpu[07-09,12]",
    "SLURM_CPUS_PER_TASK": "4",
}


def test_a_task_of_srun():
    environment = dict(OF_SRUN)
    ranks.adopt(environment)
    assert {name: value for name, value in environment.items() if name not in OF_SRUN} == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "15003",
        "OMP_NUM_THREADS": "4",
    }


def test_what_is_set_already_stays():
    environment = OF_SRUN | {"MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    ranks.adopt(environment)
    assert (environment["MASTER_PORT"], environment["OMP_NUM_THREADS"]) == ("29500", "1")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        OF_SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty bash`: an ordinary command line
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script, outside srun
        OF_SRUN | {"RANK": "1", "WORLD_SIZE": "8"},  # torchrun, started by srun
    ],
)
def test_other_processes_stay_as_they_are(variables: dict[str, str]):
    environment = dict(variables)
    ranks.adopt(environment)
    assert environment == variables


@pytest.mark.parametrize(
    ("node_list", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[07-09,12],login", "gpu07"), ("a[03],b[1-2]", "a03"), ("x,y", "x")],
)
def test_first_node(node_list: str, first: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks.socket, "getaddrinfo", lambda name, port: [name])
    assert ranks._first_address(node_list) == first


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.num_nodes=2",), "train.num_nodes: 2 nodes, "),
        (("launch.detach=true",), "launch.detach: true needs Slurm: "),
        (
            ("hydra/launcher=slurm", "hydra.launcher.gpus_per_node=4", "train.num_devices=2"),
            "train.num_devices: 2 differs from hydra.launcher.gpus_per_node (4); ",
        ),
        (("hydra/launcher=slurm", "hydra.launcher.partion=x"), "hydra.launcher.partion: no such key "),
        (("hydra/launcher=slurm", "train.stpes=choice(1)"), "train.stpes: no such key "),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], message: str, tmp_path):
    code, _, err = train(*TINY, *arguments, cwd=tmp_path)
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith(message)
