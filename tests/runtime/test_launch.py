"""What `accelerate launch --cpu` was asked for, read off its command line."""

from __future__ import annotations

import pytest

from rlhfkit.errors import ConfigError
from rlhfkit.runtime.launch import wanted_cpu_processes

ASKED = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
LAUNCH = ["python", "accelerate", "launch", "--cpu"]


@pytest.mark.parametrize("words", [["--num_processes", "2"], ["--num-processes", "2"], ["--num_processes=2"]])
def test_the_number_on_the_command_line(words):
    assert wanted_cpu_processes(ASKED, [*LAUNCH, *words, "-m", "rlhfkit"]) == 2


@pytest.mark.parametrize(
    "environment",
    [{}, {"ACCELERATE_USE_CPU": "True"}, {**ASKED, "WORLD_SIZE": "2"}, {**ASKED, "PMI_SIZE": "2"}],
    ids=["plain", "one wanted", "started by torch", "started by mpirun"],
)
def test_nothing_to_do(environment):
    assert wanted_cpu_processes(environment, [*LAUNCH, "--num_processes", "2"]) == 1


@pytest.mark.parametrize("words", [[], ["--num_machines", "2", "--num_processes", "4"]])
def test_what_cannot_be_started_is_an_error(words):
    with pytest.raises(ConfigError) as error:
        wanted_cpu_processes(ASKED, [*LAUNCH, *words])
    assert "torchrun" in error.value.hint
