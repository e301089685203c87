"""Names of recipe keys in other trainers: transformers' TrainingArguments, TRL, LLaMA-Factory, Axolotl and torchtune.

Used by ``toolkit.config.recipe.did_you_mean`` alone: the error for such a key names ours; its value is never used.
"""

from __future__ import annotations

from collections.abc import Mapping

_NAMES_BY_KEY: Mapping[str, tuple[str, ...]] = {
    "model.name_or_path": (
        "model", "model_name", "model_name_or_path", "model_path", "base_model", "pretrained_model_name_or_path",
    ),
    "model.revision": ("model_revision",),
    "model.dtype": ("torch_dtype", "precision"),
    "model.attn_implementation": ("attn_impl", "flash_attn", "attention_implementation"),
    "mask.train": ("trainable_layers", "trainable_modules", "modules_to_save"),
    "mask.freeze": ("freeze_layers", "frozen_layers"),
    "data.path": (
        "dataset", "datasets", "dataset_name", "dataset_path", "train_file", "train_data", "data_path", "data_files",
    ),
    "model.add_tokens": ("new_tokens", "add_special_tokens", "new_special_tokens", "additional_special_tokens"),
    "data.split": ("dataset_split", "dataset_train_split"),
    "data.name": ("dataset_config_name", "dataset_config", "subset", "config_name"),
    "data.revision": ("dataset_revision",),
    "data.limit": ("max_samples", "max_train_samples", "num_samples"),
    "data.validation": (
        "eval_dataset", "validation_file", "validation_split", "val_size", "val_set_size", "test_datasets",
    ),
    "data.max_length": (
        "cutoff_len", "max_seq_length", "max_seq_len", "model_max_length", "sequence_len", "block_size",
    ),
    "data.chat_template": ("chat_template_path", "chat_template_jinja"),
    "data.template_kwargs": ("chat_template_kwargs",),
    "data.task": ("dataset_format", "datasets_format"),
    "data.packing": ("sample_packing", "padding_free", "packed"),
    "train.epochs": ("num_train_epochs", "num_epochs", "n_epochs"),
    "train.max_steps": ("max_train_steps",),
    "train.micro_batch_size": (
        "per_device_train_batch_size", "per_gpu_train_batch_size", "train_micro_batch_size_per_gpu", "batch",
        "batch_size",
    ),
    "train.gradient_accumulation_steps": (
        "gradient_accumulation", "grad_accumulation", "grad_accum", "accumulation_steps",
    ),
    "train.learning_rate": ("lr", "max_lr", "peak_lr"),
    "train.weight_decay": ("wd",),
    "train.scheduler": ("lr_scheduler", "lr_scheduler_type", "lr_schedule"),
    "train.max_grad_norm": (
        "max_gradient_norm", "gradient_clipping", "gradient_clip_val", "grad_clip", "clip_grad_norm",
    ),
    "train.gradient_checkpointing": (
        "activation_checkpointing", "enable_activation_checkpointing", "use_gradient_checkpointing",
    ),
    "train.reduce_dtype": ("mixed_precision_reduce", "grad_reduce_in_fp32", "communication_data_type"),
    "train.seed": ("random_seed", "data_seed"),
    "train.metric_for_best_model": ("metric_for_best_model",),
    "train.early_stopping_patience": ("early_stopping", "early_stopping_steps"),
    "optim.name": ("optim", "optimizer", "optimizer_type"),
    "optim.eps": ("adam_epsilon", "epsilon"),
    "output.dir": ("output_dir", "save_dir", "out_dir"),
    "output.save_every_steps": ("save_steps",),
    "output.evaluate_every_steps": ("eval_steps",),
    "output.keep": ("save_total_limit",),
    "output.report_to": ("loggers", "logger", "metric_logger"),
}  # fmt: skip

EQUIVALENT_KEYS: Mapping[str, str] = {name: key for key, names in _NAMES_BY_KEY.items() for name in names}
"""Key of ours by a name that others give it."""

_NAMES_BY_LORA_KEY: Mapping[str, tuple[str, ...]] = {
    "select": ("layers", "layers_to_transform"),
    "targets": ("lora_target", "lora_target_modules", "target_modules"),
    "rank": ("r", "lora_r", "lora_rank"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "rslora": ("use_rslora",),
    "dora": ("use_dora",),
    "init": ("init_lora_weights",),
    "base_precision": ("quantization", "quant_type", "precision"),
}

LORA_KEYS: Mapping[str, str] = {name: key for key, names in _NAMES_BY_LORA_KEY.items() for name in names}
"""Key of ``mask.train``'s ``lora`` entries by a name that peft and other trainers give it."""

_NAMES_BY_ANSWER: Mapping[str, tuple[str, ...]] = {
    "adapters are an entry of mask.train: {lora: {select: last:8, rank: 16}} (docs/adapters.md)": (
        "adapter", "finetuning_type", "lora", "lora_r", "lora_rank", "lora_alpha", "lora_dropout", "lora_target",
        "lora_target_modules", "lora_target_linear", "lora_modules_to_save", "lora_attn_modules", "lora_model_dir",
        "target_modules", "use_peft", "use_dora", "use_rslora", "peft_config", "adapter_name_or_path",
        "apply_lora_to_mlp",
    ),
    "frozen weights can be kept in fewer bits, trained ones cannot: prefix.precision below the frost line, and "
    "base_precision of a lora entry in adapted blocks": (
        "load_in_8bit", "load_in_4bit", "quantization_bit", "quantization_config", "bnb_4bit_quant_type",
    ),
    "blocks take turns by mask.rotation: {method: lisa, blocks: 2, every_steps: 20}, or method: badam "
    "(docs/schedule.md)": (
        "lisa_n_layers", "lisa_step_interval", "lisa_activated_layers", "lisa_interval_steps", "use_lisa", "use_badam",
        "badam_mode", "badam_switch_mode", "badam_switch_interval", "badam_start_layer", "switch_block_every",
    ),
    "rows of tables are an entry of mask.train: {rows: {select: embeddings, from: added}} (docs/rows.md)": (
        "trainable_token_indices", "trainable_tokens", "token_indices", "resize_vocab", "fix_untrained_tokens",
    ),
    "selectors say what trains, such as last:4 or 're:PATTERN': mask.train (docs/layer-mask.md)": (
        "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "unfrozen_parameters",
        "num_layer_trainable", "unfreeze_layers",
    ),
    "only the language model trains: mask.train": (
        "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model",
    ),
    "model.dtype is bfloat16, the default, or float32": ("bf16", "pure_bf16", "bf16_full_eval", "mixed_precision"),
    "nothing trains in float16 here: model.dtype is bfloat16, the default, or float32": (
        "fp16", "float16", "fp16_full_eval", "fp16_opt_level",
    ),
    "it stays as torch has it": ("tf32",),
    "torch.compile is not used": ("torch_compile", "compile", "torch_compile_backend", "torch_compile_mode"),
    "head and loss are computed in tiles anyway (docs/supervised-loss.md)": ("use_liger_kernel", "enable_liger_kernel"),
    "a validation takes train.micro_batch_size rows at once; launch/evaluate.py has --batch-size": (
        "per_device_eval_batch_size", "per_gpu_eval_batch_size", "eval_batch_size",
    ),
    "it is the product of train.micro_batch_size, train.gradient_accumulation_steps and the number of ranks": (
        "global_batch_size", "train_batch_size", "effective_batch_size",
    ),
    "warmup is a share of all steps: train.warmup_ratio": ("warmup_steps", "num_warmup_steps"),
    "linear and cosine end at 0: train.scheduler": (
        "min_lr", "lr_min", "min_lr_rate", "lr_scheduler_kwargs", "cosine_min_lr_ratio",
    ),
    "both decay rates are one key: optim.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "AdamW has optim.betas, optim.eps and train.weight_decay": ("optim_args", "optimizer_kwargs"),
    "the loss is the cross entropy, without smoothing": ("label_smoothing_factor", "label_smoothing"),
    "no noise is added to embeddings": ("neftune_noise_alpha",),
    "only trained blocks are ever recomputed: train.gradient_checkpointing": (
        "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "activation_offloading",
    ),
    "data.task says which columns make prompt and answer; the model's template or data.chat_template renders them": (
        "template", "dataset_text_field", "dataset_kwargs", "prompt_template", "formatting_func",
    ),
    "answers are learned, never the prompt; data.train_on says whether all or the last (docs/tasks.md)": (
        "train_on_inputs", "train_on_prompt", "completion_only_loss", "assistant_only_loss", "mask_history",
        "roles_to_train", "loss_scale",
    ),
    "every row of data.path is read before training": ("streaming",),
    "data.path takes a directory, a pattern or a list of files as well": ("dataset_dir", "data_dir"),
    "data.path is a list of {path, weight}: weight 2 takes each row twice in an epoch": (
        "mix_strategy", "interleave_probs", "interleave_prob", "dataset_mixer", "dataset_weights", "stopping_strategy",
    ),
    "data.oversample takes rows of rare labels more often": ("class_weights", "label_weights", "class_weight"),
    "rows of one length need not meet: data.packing leaves padding out": ("group_by_length", "packing_strategy"),
    "rows are shuffled in each epoch, by train.seed": ("shuffle", "shuffle_merged_datasets"),
    "batches are made ahead in the background; there is nothing to set": (
        "dataloader_num_workers", "num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
        "preprocessing_num_workers", "dataset_num_proc", "dataset_processes",
    ),
    "every step is written to metrics.jsonl and TensorBoard; there is nothing to set": (
        "logging_steps", "logging_strategy", "logging_first_step", "log_every_n_steps",
    ),
    "metrics.jsonl and TensorBoard's curves are in output.dir, whose name is the run's": ("logging_dir", "run_name"),
    "output.report_to: [tensorboard, wandb] sends to wandb, which reads WANDB_PROJECT, WANDB_NAME and its other "
    "variables (docs/trackers.md)": (
        "wandb_project", "use_wandb", "wandb_run_name", "wandb_entity", "wandb_name", "wandb_mode", "wandb_run_id",
    ),
    "output.report_to: [tensorboard, mlflow] sends to MLflow, which reads MLFLOW_TRACKING_URI and "
    "MLFLOW_EXPERIMENT_NAME (docs/trackers.md)": (
        "mlflow_tracking_uri", "use_mlflow", "mlflow_experiment_name", "mlflow_run_name",
    ),
    "output.report_to has tensorboard unless another list is given": ("use_tensorboard",),
    "each epoch ends with a checkpoint, and the best is kept: output.save_every_steps, output.keep": (
        "save_strategy", "saves_per_epoch", "save_only_model", "load_best_model_at_end", "greater_is_better",
    ),
    "each epoch ends with a validation if data.validation names rows; more often: output.evaluate_every_steps": (
        "eval_strategy", "evaluation_strategy", "evals_per_epoch", "eval_on_start", "do_eval", "do_train",
    ),
    "the same command goes on where a run stopped: output.resume; from its weights alone: model.delta": (
        "resume_from_checkpoint", "auto_resume_from_checkpoints", "restore_callback_states_from_checkpoint",
    ),
    "a finished run is never overwritten; output.dir names another directory": ("overwrite_output_dir",),
    "nothing is uploaded; launch/export.py writes a model directory": (
        "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo",
    ),
    "no key holds a token: log in with `hf auth login`, or set HF_TOKEN": ("hub_token", "use_auth_token"),
    "the DeepSpeed file goes on the command line: --ds FILE": (
        "deepspeed", "deepspeed_config", "ds", "ds_config", "zero_stage",
    ),
    "torch's FSDP is not in this version; DeepSpeed shards: --ds ds_configs/zero3.json": (
        "fsdp", "fsdp_config", "fsdp_version",
    ),
    "the GPU is taken where there is one; CUDA_VISIBLE_DEVICES= hides it": ("device", "use_cpu", "no_cuda"),
    "that is for the launcher to say: deepspeed, torchrun, accelerate launch or srun (docs/launchers.md)": (
        "num_gpus", "nproc_per_node", "world_size", "num_processes", "ddp_timeout", "ddp_backend",
    ),
}  # fmt: skip

ALTERNATIVES: Mapping[str, str] = {name: answer for answer, names in _NAMES_BY_ANSWER.items() for name in names}
"""For a key without an equivalent, what to use instead, as a clause of the error message."""
