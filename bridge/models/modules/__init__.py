"""Modules of ours inside megatron-core models: what it lacks, or computes unlike transformers."""
