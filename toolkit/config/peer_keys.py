"""Names of recipe keys in other trainers: transformers' TrainingArguments, TRL, LLaMA-Factory, Axolotl and torchtune.

Used by ``toolkit.config.recipe.did_you_mean`` alone: the error for such a key names ours; its value is never used.
"""

from __future__ import annotations

from collections.abc import Mapping

EQUIVALENT_KEYS: Mapping[str, str] = {
    # model
    "model": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "pretrained_model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "attn_impl": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "attention_implementation": "model.attn_implementation",
    # mask
    "trainable_layers": "mask.train",
    "trainable_modules": "mask.train",
    "modules_to_save": "mask.train",
    "freeze_layers": "mask.freeze",
    "frozen_layers": "mask.freeze",
    # data
    "dataset": "data.path",
    "datasets": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "train_file": "data.path",
    "train_data": "data.path",
    "data_path": "data.path",
    "data_files": "data.path",
    "dataset_split": "data.split",
    "dataset_train_split": "data.split",
    "eval_dataset": "data.validation",
    "validation_file": "data.validation",
    "validation_split": "data.validation",
    "val_size": "data.validation",
    "val_set_size": "data.validation",
    "test_datasets": "data.validation",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "sequence_len": "data.max_length",
    "block_size": "data.max_length",
    "sample_packing": "data.packing",
    "padding_free": "data.packing",
    "packed": "data.packing",
    # train
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "n_epochs": "train.epochs",
    "max_train_steps": "train.max_steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_gpu_train_batch_size": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "batch": "train.micro_batch_size",
    "batch_size": "train.micro_batch_size",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "grad_accumulation": "train.gradient_accumulation_steps",
    "grad_accum": "train.gradient_accumulation_steps",
    "accumulation_steps": "train.gradient_accumulation_steps",
    "lr": "train.learning_rate",
    "max_lr": "train.learning_rate",
    "peak_lr": "train.learning_rate",
    "wd": "train.weight_decay",
    "lr_scheduler": "train.scheduler",
    "lr_scheduler_type": "train.scheduler",
    "lr_schedule": "train.scheduler",
    "max_gradient_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "gradient_clip_val": "train.max_grad_norm",
    "grad_clip": "train.max_grad_norm",
    "clip_grad_norm": "train.max_grad_norm",
    "activation_checkpointing": "train.gradient_checkpointing",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "random_seed": "train.seed",
    "data_seed": "train.seed",
    # optim
    "optim": "optim.name",
    "optimizer": "optim.name",
    "optimizer_type": "optim.name",
    "adam_epsilon": "optim.eps",
    "epsilon": "optim.eps",
    # output
    "output_dir": "output.dir",
    "save_dir": "output.dir",
    "out_dir": "output.dir",
    "save_steps": "output.save_every_steps",
    "eval_steps": "output.evaluate_every_steps",
    "save_total_limit": "output.keep",
}
"""Key of ours by a name that others give it."""

_NO_ADAPTERS = "adapters (LoRA and its kin) are not in this version: mask.train trains whole tensors"
_QUANTISED = "frozen weights can be kept in fewer bits, trained ones cannot: prefix.precision"
_BLOCKS = "selectors say what trains, such as last:4 or 're:PATTERN': mask.train (docs/layer-mask.md)"
_ENDS_AT_0 = "linear and cosine end at 0: train.scheduler"
_SHARE = "warmup is a share of all steps: train.warmup_ratio"
_BETAS = "both decay rates are one key: optim.betas"
_PRECISION = "model.dtype is bfloat16, the default, or float32"
_GLOBAL = "it is the product of train.micro_batch_size, train.gradient_accumulation_steps and the number of ranks"
_EVALUATION_ROWS = "a validation takes train.micro_batch_size rows at once; launch/evaluate.py has --batch-size"
_CONVERSATION = "data.task says which columns make prompt and answer, and the model's chat template renders them"
_ANSWERS_ONLY = "the answer is learned, never the prompt (docs/supervised-loss.md)"
_ALL_ROWS = "every row of data.path is read before training"
_EVERY_STEP = "every step is written to metrics.jsonl and TensorBoard; there is nothing to set"
_LOCAL_CURVES = "a run writes metrics.jsonl and TensorBoard's curves into output.dir, and sends nothing anywhere"
_CHECKPOINTS = "each epoch ends with a checkpoint, and the best is kept: output.save_every_steps, output.keep"
_VALIDATIONS = (
    "each epoch ends with a validation if data.validation names rows; more often: output.evaluate_every_steps"
)
_RESUME = "the same command goes on where a run stopped: output.resume; from its weights alone: model.delta"
_NO_UPLOAD = "nothing is uploaded; launch/export.py writes a model directory"
_DEEPSPEED = "the DeepSpeed file goes on the command line: --ds FILE"
_FSDP = "torch's FSDP is not in this version; DeepSpeed shards: --ds ds_configs/zero3.json"
_DEVICE = "the GPU is taken where there is one; CUDA_VISIBLE_DEVICES= hides it"
_LAUNCHER = "that is for the launcher to say: deepspeed, torchrun, accelerate launch or srun (docs/launchers.md)"

_KEYS_BY_ANSWER: Mapping[str, tuple[str, ...]] = {
    _NO_ADAPTERS: (
        "adapter", "finetuning_type", "lora", "lora_r", "lora_rank", "lora_alpha", "lora_dropout", "lora_target",
        "lora_target_modules", "lora_target_linear", "lora_modules_to_save", "lora_attn_modules", "lora_model_dir",
        "target_modules", "use_peft", "use_dora", "use_rslora", "peft_config", "adapter_name_or_path",
        "apply_lora_to_mlp",
    ),
    _QUANTISED: ("load_in_8bit", "load_in_4bit", "quantization_bit", "quantization_config", "bnb_4bit_quant_type"),
    _BLOCKS: (
        "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "unfrozen_parameters",
        "num_layer_trainable", "unfreeze_layers", "lisa_n_layers",
    ),
    "only the language model trains: mask.train": (
        "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model",
    ),
    _PRECISION: ("bf16", "pure_bf16", "bf16_full_eval", "mixed_precision"),
    f"nothing trains in float16 here: {_PRECISION}": ("fp16", "float16", "fp16_full_eval", "fp16_opt_level"),
    "it stays as torch has it": ("tf32",),
    "torch.compile is not used": ("torch_compile", "compile", "torch_compile_backend", "torch_compile_mode"),
    "head and loss are computed in tiles anyway (docs/supervised-loss.md)": ("use_liger_kernel", "enable_liger_kernel"),
    _EVALUATION_ROWS: ("per_device_eval_batch_size", "per_gpu_eval_batch_size", "eval_batch_size"),
    _GLOBAL: ("global_batch_size", "train_batch_size", "effective_batch_size"),
    _SHARE: ("warmup_steps", "num_warmup_steps"),
    _ENDS_AT_0: ("min_lr", "lr_min", "min_lr_rate", "lr_scheduler_kwargs", "cosine_min_lr_ratio"),
    _BETAS: ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "AdamW has optim.betas, optim.eps and train.weight_decay": ("optim_args", "optimizer_kwargs"),
    "the loss is the cross entropy, without smoothing": ("label_smoothing_factor", "label_smoothing"),
    "no noise is added to embeddings": ("neftune_noise_alpha",),
    "only trained blocks are ever recomputed: train.gradient_checkpointing": (
        "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "activation_offloading",
    ),
    "a run ends after train.epochs or train.max_steps, and its best checkpoint is kept": ("early_stopping_patience",),
    _CONVERSATION: (
        "template", "chat_template", "dataset_text_field", "dataset_kwargs", "prompt_template", "formatting_func",
    ),
    _ANSWERS_ONLY: (
        "train_on_inputs", "train_on_prompt", "completion_only_loss", "assistant_only_loss", "mask_history",
        "roles_to_train",
    ),
    _ALL_ROWS: ("streaming", "max_samples", "max_train_samples", "dataset_dir", "dataset_config_name", "data_dir"),
    "rows of one length need not meet: data.packing leaves padding out": ("group_by_length", "packing_strategy"),
    "rows are shuffled in each epoch, by train.seed": ("shuffle", "shuffle_merged_datasets"),
    "batches are made ahead in the background; there is nothing to set": (
        "dataloader_num_workers", "num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
        "preprocessing_num_workers", "dataset_num_proc", "dataset_processes",
    ),
    _EVERY_STEP: ("logging_steps", "logging_strategy", "logging_first_step", "log_every_n_steps"),
    _LOCAL_CURVES: (
        "report_to", "logging_dir", "run_name", "wandb_project", "use_wandb", "wandb_run_name", "mlflow_tracking_uri",
        "use_tensorboard", "metric_logger",
    ),
    _CHECKPOINTS: (
        "save_strategy", "saves_per_epoch", "save_only_model", "load_best_model_at_end", "metric_for_best_model",
        "greater_is_better",
    ),
    _VALIDATIONS: (
        "eval_strategy", "evaluation_strategy", "evals_per_epoch", "eval_on_start", "do_eval", "do_train",
    ),
    _RESUME: ("resume_from_checkpoint", "auto_resume_from_checkpoints", "restore_callback_states_from_checkpoint"),
    "a finished run is never overwritten; output.dir names another directory": ("overwrite_output_dir",),
    _NO_UPLOAD: ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
    "no key holds a token: log in with `hf auth login`, or set HF_TOKEN": ("hub_token", "use_auth_token"),
    _DEEPSPEED: ("deepspeed", "deepspeed_config", "ds", "ds_config", "zero_stage"),
    _FSDP: ("fsdp", "fsdp_config", "fsdp_version"),
    _DEVICE: ("device", "use_cpu", "no_cuda"),
    _LAUNCHER: ("num_gpus", "nproc_per_node", "world_size", "num_processes", "ddp_timeout", "ddp_backend"),
}  # fmt: skip

ALTERNATIVES: Mapping[str, str] = {name: answer for answer, names in _KEYS_BY_ANSWER.items() for name in names}
"""For a key without an equivalent, what to use instead, as a clause of the error message."""
