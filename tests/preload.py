"""Imported once by the fork server of tests/distributed.py, so that no worker pays for these imports again.

Imports only: a tensor operation here could start threads, which a fork does not carry over.
"""

# ruff: noqa: E402, F401
import gc

import pytest
import torch

from bridge import platform

platform.prepare()  # before megatron: what it adapts is decided while megatron is imported

import megatron.core.dist_checkpointing
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer
import megatron.core.pipeline_parallel

import bridge.training.run

gc.collect()
gc.freeze()  # or every worker's collections would walk through all of it, and copy its pages: 0.5 s each
