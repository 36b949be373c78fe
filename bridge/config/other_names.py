"""What other programs call the keys and options here: for hints, never read as settings.

A target is a key, or where no key is the same thing what to do instead.
"""

import shlex
from typing import Any

_LENGTH = "a run is train.steps optimizer steps or train.epochs epochs long"
_ACCUMULATION = (
    "train.global_batch_size counts the sequences of a step; what exceeds train.micro_batch_size on every process is "
    "accumulated"
)
_RESUME = "the same command resumes the run in runs_dir/name; init.path=DIR starts another from its weights"
_PLACE = "a run writes to the directory runs_dir/name; set runs_dir and name"
_DATA = "data=OPTION chooses a source, data.source=MODULE one of your own"
_SHARDED = "choose parallelism=dp_sharded"
_PRECISION = "choose precision=bf16, precision=fp16 or precision=fp32"
_RECOMPUTE = "set parallelism.recompute_granularity=selective or full"
_REPLICAS = (
    "it is the number of all processes (train.num_devices x train.num_nodes) divided by the sizes in parallelism"
)

_TARGETS: dict[str, str] = {
    # length of the run and batches
    "optimizer.lr": "lr learning_rate max_lr base_lr peak_lr",
    "train.steps": (
        "steps max_steps num_steps total_steps train_steps training_steps train_iters max_iters num_iterations "
        "iterations n_steps"
    ),
    "train.epochs": "epochs epoch num_epochs max_epochs num_train_epochs n_epochs total_epochs train_epochs",
    _LENGTH: "max_tokens",
    "train.global_batch_size": "batch_size bs gbs train_batch_size total_batch_size batch",
    "train.micro_batch_size": (
        "mbs per_device_train_batch_size per_device_batch_size device_batch_size micro_batch "
        "train_micro_batch_size_per_gpu local_batch_size"
    ),
    _ACCUMULATION: (
        "gradient_accumulation_steps grad_accum_steps grad_accum accumulate_grad_batches gradient_accumulation "
        "accumulation_steps"
    ),
    "train.eval_interval": (
        "eval_steps eval_every eval_freq eval_step val_check_interval val_interval evaluation_interval"
    ),
    "train.eval_samples": "max_eval_samples num_eval_samples",
    "write eval_only=true": "evaluate do_eval eval validate test_only eval_mode",
    "train.exit_after": "max_time time_limit max_hours",
    "train.eval_samples counts samples, so that the loss does not depend on the batch size": (
        "eval_iters eval_iterations eval_batches max_eval_batches limit_val_batches max_eval_steps"
    ),
    "train.seed": "seed random_seed manual_seed",
    "train.num_devices": (
        "gpus num_gpus n_gpus ngpus devices gpus_per_node nproc nproc_per_node num_processes world_size n_devices"
    ),
    "devices are found by themselves; train.num_devices says how many to use": "trainer accelerator device",
    "train.num_nodes": "nodes nnodes",
    # optimizer and schedule
    "optimizer.min_lr": "lr_min min_learning_rate end_lr",
    "optimizer.weight_decay": "wd decay",
    "optimizer.clip_grad": (
        "grad_clip max_grad_norm gradient_clip_val clip_norm gradient_clipping max_norm grad_norm_clip"
    ),
    "optimizer.adam_beta1": "beta1 adam_b1",
    "optimizer.adam_beta2": "beta2 adam_b2",
    "set optimizer.adam_beta1 and optimizer.adam_beta2": "betas",
    "optimizer.adam_eps": "eps epsilon adam_epsilon",
    "optimizer.sgd_momentum": "momentum",
    "optimizer": "optimizer_name optim optimizer_type",
    "scheduler.lr_warmup_steps": "warmup warmup_steps num_warmup_steps warmup_iters lr_warmup_iters lr_warmup",
    "scheduler.lr_warmup_steps counts steps": "warmup_ratio warmup_fraction lr_warmup_fraction",
    "scheduler.lr_decay_steps": "lr_decay_iters decay_steps",
    "scheduler.lr_decay_style": "lr_scheduler lr_scheduler_type scheduler_type schedule lr_schedule",
    # checkpoints and directories
    _RESUME: (
        "resume resume_from resume_from_checkpoint ckpt ckpt_path load load_path load_checkpoint restore "
        "checkpoint_path"
    ),
    "checkpoint.save_interval": "save_steps save_every save_freq save_iters ckpt_interval checkpoint_interval",
    "checkpoint.keep_last": "save_total_limit save_top_k keep_last_k max_checkpoints keep_checkpoints",
    "checkpoint.keep_best": "metric_for_best_model load_best_model_at_end save_best monitor",
    "checkpoint.best_is": "greater_is_better",
    "train.patience": "early_stopping_patience early_stopping",
    "init.path": (
        "model_name model_name_or_path pretrained pretrained_model_name_or_path base_model init_from model_path "
        "pretrained_checkpoint hf_path"
    ),
    _PLACE: "output_dir out_dir save_dir log_dir default_root_dir exp_dir run_dir work_dir output",
    "name": "run_name experiment_name exp_name run_id exp task_name",
    # model
    "model.num_layers": "n_layer n_layers num_hidden_layers layers depth",
    "model.hidden_size": "n_embd d_model hidden_dim embed_dim dim",
    "model.ffn_hidden_size": "intermediate_size d_ff ffn_dim mlp_dim",
    "model.num_attention_heads": "n_head n_heads num_heads heads",
    "model.num_query_groups": "num_key_value_heads n_kv_heads num_kv_heads",
    "model.kv_channels": "head_dim",
    "model.rotary_base": "rope_theta rope_base",
    "model.layernorm_epsilon": "rms_norm_eps layer_norm_eps norm_eps layer_norm_epsilon",
    "model.max_sequence_length": "max_position_embeddings n_positions n_ctx",
    "model.num_moe_experts": "num_experts n_experts num_local_experts",
    "model.moe_router_topk": "num_experts_per_tok top_k_experts",
    "set model.hidden_dropout and model.attention_dropout": "dropout",
    "model.attention_backend": "attn_implementation attn_impl",
    "set model.attention_backend=flash": (
        "use_flash_attn use_flash_attention flash_attention flash_attn use_flash_attention_2"
    ),
    # data
    "data.sequence_length": (
        "seq_len seq_length max_seq_len max_seq_length sequence_len block_size context_length cutoff_len max_length"
    ),
    "data.tokenizer": "tokenizer_path tokenizer_name tokenizer_name_or_path tokenizer_model",
    "data.num_workers": "dataloader_num_workers workers",
    _DATA: "dataset datasets dataset_path dataset_name data_path train_data train_file train_files data_dir",
    # layout and precision
    "parallelism.tensor_model_parallel_size": "tp tp_size tensor_parallel tensor_parallel_size tensor_parallel_degree",
    "parallelism.pipeline_model_parallel_size": (
        "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_parallel_degree"
    ),
    "parallelism.context_parallel_size": "cp cp_size context_parallel context_parallel_degree",
    "parallelism.expert_model_parallel_size": "ep ep_size expert_parallel expert_parallel_size",
    "parallelism.virtual_pipeline_model_parallel_size": "vpp vpp_size",
    "parallelism.sequence_parallel": "sp",
    _REPLICAS: "dp dp_size data_parallel data_parallel_size replicas",
    _SHARDED: "fsdp zero zero_stage deepspeed strategy",
    _PRECISION: "bf16 fp16 dtype torch_dtype mixed_precision amp half",
    "set precision.fp8=hybrid with precision=bf16; it needs a GPU and Transformer Engine": "fp8",
    _RECOMPUTE: "gradient_checkpointing activation_checkpointing recompute activation_checkpoint",
    # logs
    "log.log_interval": "logging_steps log_every log_every_n_steps log_freq log_iters print_freq",
    "log.wandb.project": "wandb_project",
    "set log.wandb.project=NAME or log.tensorboard=true": "wandb use_wandb report_to logger",
    "log.wandb.entity": "wandb_entity",
    "log.wandb.name": "wandb_name wandb_run_name",
}

TARGET_OF = {name: target for target, names in _TARGETS.items() for name in names.split()}

_BF16 = "precision=bf16 trains in bfloat16 with 32-bit weights in the optimizer"
_FP16 = "precision=fp16 trains in float16 with loss scaling and 32-bit weights in the optimizer"
_FP32 = "precision=fp32 trains in 32 bits"
_ADAM = "adam decouples weight decay: it is AdamW; write optimizer=adam"
_PACKAGE = "it needs a package that is missing: pip install "

# group -> option of another program in lower case, or of a package of Hydra's -> what to write instead
OPTIONS: dict[str, dict[str, str]] = {
    "precision": {
        **dict.fromkeys(("bf16-mixed", "bf16-true", "bfloat16", "bf16_mixed", "amp_bf16", "mixed"), _BF16),
        **dict.fromkeys(("fp16-mixed", "16-mixed", "16", "16-true", "float16", "half", "fp16_mixed", "amp"), _FP16),
        **dict.fromkeys(("32", "32-true", "float32", "full", "fp32-true"), _FP32),
        "fp8": "write precision=bf16 precision.fp8=hybrid; it needs a GPU and Transformer Engine",
    },
    "optimizer": dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "fused_adam"), _ADAM),
    "parallelism": dict.fromkeys(("fsdp", "fsdp2", "zero", "zero1", "zero2", "zero3", "ddp_sharded"), _SHARDED)
    | dict.fromkeys(("ddp", "none", "single"), "choose parallelism=dp"),
    "data": dict.fromkeys(
        ("jsonl", "json", "text", "txt", "csv", "parquet", "hf", "huggingface", "datasets", "custom", "megatron"),
        "the options are {known}, and data.source=my_package.corpus takes a module of your own",
    ),
    "hydra/launcher": {
        "joblib": f"{_PACKAGE}hydra-joblib-launcher",
        "submitit_local": f"{_PACKAGE}'bridge[slurm]'",
        "submitit_slurm": f"{_PACKAGE}'bridge[slurm]', or write hydra/launcher=slurm",
        "ray": f"{_PACKAGE}hydra-ray-launcher",
        "rq": f"{_PACKAGE}hydra-rq-launcher",
    },
    "hydra/sweeper": {
        "optuna": f"{_PACKAGE}'bridge[sweep]'",
        "ax": f"{_PACKAGE}hydra-ax-sweeper",
        "nevergrad": f"{_PACKAGE}hydra-nevergrad-sweeper",
    },
    "hydra/job_logging": {"colorlog": f"{_PACKAGE}hydra-colorlog"},
    "hydra/hydra_logging": {"colorlog": f"{_PACKAGE}hydra-colorlog"},
}


def instead(key: str, value: Any = None) -> str:
    """`; write KEY=VALUE` or `; SENTENCE` for a key that another program has, else an empty string.

    The section before the name is not looked at: trainer.max_steps is max_steps.
    """
    target = TARGET_OF.get(key.rpartition(".")[2].lower().replace("-", "_"))
    if target is None or " " in target:
        return f"; {target}" if target else ""
    return written(target, value)


def written(key: str, value: Any) -> str:
    """`; write KEY=VALUE` as it is typed in a shell, or `; set KEY` for a value that is none or not plain."""
    if isinstance(value, bool):
        value = str(value).lower()
    return f"; write {shlex.quote(f'{key}={value}')}" if isinstance(value, str | int | float) else f"; set {key}"
