"""The phrases of a report in English; ``phrases_ko`` has the same keys."""

ENGLISH = {
    # title and result
    "title": "Report of {run}",
    "about": "{base}, fine-tuned in part with Frostline {version}. Weights of step {step}, {choice}.",
    "choice_latest": "the latest checkpoint",
    "score": "validation loss {loss}",
    "choice_best": "of those kept the best by validation ({score})",
    "choice_both": "the latest, and of those kept the best by validation ({score})",
    "choice_other": "neither the latest nor, of those kept, the best by validation",
    "choice_folds": "one checkpoint for each of {count} folds",
    "better_step": "By the validation rows step {step} is better ({score}).",
    "result": "Result",
    "values": "{value} {interval} against {other} {other_interval}, a difference of {difference} {difference_interval}",
    "result_better": "The fine-tuned model is better than {against} in {metric}, the declared metric: {values}.",
    "result_worse": "The fine-tuned model is worse than {against} in {metric}, the declared metric: {values}.",
    "result_none_shown": "No difference from {against} is shown in {metric}, the declared metric: {values}.",
    "result_few": (
        "Nothing is claimed, as there are fewer than {least} independent rows. The fine-tuned model beside {against} "
        "in {metric}, the declared metric: {values}."
    ),
    "result_undirected": (
        "The fine-tuned model beside {against} in {metric}, the declared metric, of which neither direction is better: "
        "{values}."
    ),
    "result_alone": (
        "The fine-tuned model scored {value} {interval} in {metric}, the declared metric. No other model was scored "
        "beside it, so nothing is claimed."
    ),
    "result_trivial": "The best trivial answer ({name}) scored {value} {interval}.",
    "result_no_trivial": "No trivial answer has a score in this metric.",
    "result_missing": "This report has no scores: nothing says whether the model got better. This command adds them:",
    "rows_held_out": "Scored on {rows} rows that were held out from training{part}.",
    "rows_grouped": "They are of {units} groups, and groups alone are independent of each other.",
    "rows_seen": (
        "Scored on {rows} rows of files that the model was trained on: the scores do not show what it does with new "
        "rows."
    ),
    "rows_unknown": "Scored on {rows} rows; whether the model was trained on some of them is not known.",
    "of_validation": ", the validation rows, by which a checkpoint may have been chosen",
    "of_test": ", the test rows",
    "of_folds": ", each by the fold that did not see it",
    # what was trained
    "trained": "What was trained",
    "mask_title": "Parts of the model from the input, below, to the head, above",
    "frost_line": "frost line: frozen below",
    "trained_share": "{trained} of {total} parameters trained ({share}).",
    "trained_only": "{trained} parameters trained; the number of all parameters was not recorded.",
    "line_within": "The frost line is at block {boundary} of {blocks}: what lies below was frozen.",
    "line_above": "The frost line is above all {blocks} blocks, which were frozen.",
    "line_none": "The frost line is below everything: the model has no frozen prefix.",
    "adapters": "{kind} adapters of rank {rank} and alpha {alpha} trained beside {count} linear layers.",
    "table_rows": "{count} rows of {table} trained; its other rows were frozen.",
    "quantised": "{count} frozen linear layers were held in {precision}.",
    "tied_untie": "The head is its own tensor; in the base model it is tied to the embeddings.",
    "tied_both": "Head and embeddings are one tensor, which trained as a whole.",
    "tied_head_only": (
        "Head and embeddings are one tensor, which trained through the head alone; the embeddings moved along."
    ),
    "phases": "The mask changed while training; parts and numbers are those of all phases together.",
    "rotation": (
        "The blocks took turns ({method}): {blocks} at a time, for {steps} steps; parts and numbers are those of all "
        "turns together."
    ),
    "phase": "steps {first} to {last}: {parameters} parameters, frost line at block {boundary}",
    "part": "part", "tensors": "tensors", "parameters": "parameters", "state": "state", "total": "total",
    "part_embeddings": "embeddings", "part_other": "other", "part_block": "block", "part_blocks": "blocks",
    "part_norm": "norm", "part_head": "head", "state_frozen": "frozen", "state_trained": "trained",
    "state_partly": "{share} trained",
    # curves
    "curves": "Curves",
    "curve_loss": "Loss in nats a token, by step",
    "curve_rate": "Learning rate, by step",
    "curve_loss_label": "Training loss from {first} to {last} over {steps} steps; {validation}",
    "curve_rate_label": "Learning rate over {steps} steps, at most {most}",
    "legend_train": "training", "legend_validation": "validation",
    "curve_best": "lowest validation loss {loss} at step {step}",
    "curve_no_validation": "no validation loss", "curve_folds": "each line is a fold",
    "curves_missing": "metrics.jsonl is not in the run directory, so there are no curves.",
    # scores
    "scores": "Scores", "metric": "metric", "declared": "declared", "higher": "higher is better",
    "lower": "lower is better", "model_run": "fine-tuned", "model_base": "base",
    "model_corrected": "base, prior-corrected", "its_base": "its base", "model_shots": "base, {count} shots",
    "difference": "difference to {against}", "trivial": "trivial",
    "trivial_majority": "majority class of the training rows",
    "trivial_majority_here": "majority class of these rows",
    "trivial_prior": "class prior of the training rows",
    "trivial_prior_here": "class prior of these rows",
    "trivial_plain": "TF-IDF + logistic regression, fitted to the training rows",
    "trivial_last": "context's last sentence",
    "trivial_question": "sentence nearest the question",
    "trivial_another": "another row's answer",
    "trivial_oracle": "oracle: sentence nearest the reference",
    "verdict_better": "better", "verdict_worse": "worse", "verdict_none": "no difference shown",
    "verdict_few": "too few rows",
    "scores_note": (
        "Brackets hold 95% intervals of {resamples} resamples of the rows, or of their groups; differences are of the "
        "same resamples. Verdicts on metrics other than {metric} are corrected for their number (Holm). Intervals say "
        "how results vary over rows, not over training seeds."
    ),
    "details": "Scores by label or field",
    "scores_missing": "This report was made without an evaluation.",
    "answered_note": "Metrics of generated answers are of the first {answered} rows.",
    # answers
    "answers": "Answers side by side",
    "answers_note": (
        "The first {shown} of {answered} answered rows. Words of the base's answer that the fine-tuned model left out "
        "are <del>struck through</del>, and those that it wrote instead are <ins>underlined</ins>."
    ),
    "answers_plain": "The first {shown} of {answered} answered rows.",
    "answers_missing": "No answers were generated.",
    "row": "Row {number}", "question": "Question", "contexts": "Context", "reference": "reference",
    "no_answer": "(empty)",
    "contamination": (
        "They come from {sources}, public before the base was made: that it saw them cannot be excluded, so both "
        "scores may be too high, their difference less so."
    ),
    # drift and forgetting
    "forgetting": "Drift and forgetting",
    "forgetting_missing": "Neither was measured. This measures both, on everyday prompts and on items of yours:",
    "forgetting_drift": "Drift",
    "forgetting_drift_note": (
        "Loss of the base's own answers to {rows} everyday prompts: how far training moved the model where no task "
        "asked for it. To move is neither better nor worse."
    ),
    "forgetting_items": "Forgetting",
    "forgetting_items_note": "Scores on {rows} labelled items of another ability; {metric} is the declared metric.",
    # data
    "data": "Data check", "data_source": "rows", "data_task": "task", "data_train": "training rows",
    "data_validation": "validation rows", "data_test": "test rows", "data_skipped": "bad rows skipped",
    "data_shortened": "rows that lost context",
    "data_length": "longest row, in tokens (data.max_length)",
    "data_seed": "seed of split and order", "data_group": "grouped by", "data_stratify": "stratified by",
    "data_files": "files", "data_fold": "fold", "bytes": "{size} bytes", "unknown": "not recorded", "none": "none",
    "data_note": "This is what the run recorded of its rows. Duplicates, leaks and identifiers are looked for by:",
    # cost
    "cost": "Cost", "cost_steps": "optimizer steps", "cost_epochs": "epochs", "cost_tokens": "tokens read",
    "cost_supervised": "tokens with a loss", "cost_seconds": "time in steps", "cost_speed": "tokens a second",
    "cost_memory": "peak memory of a rank",
    "cost_planned": "planned peak of its tensors",
    "cost_note": "Time is that of the training steps, without set-up, validation and checkpoints.",
    "cost_memory_cpu": "On a CPU the measured peak includes Python and its libraries.",
    "of": "{part} of {whole}", "gib": "{size} GiB",
    "time": "{hours} h {minutes} min {seconds} s",
    # versions
    "versions": "Versions and hardware", "engine": "engine", "ranks": "ranks", "device": "device",
    "cpu_cores": "CPU cores", "system": "system",
    # how to repeat it
    "repeat": "How to repeat it",
    "repeat_train": "Train anew from the recipe that the run saved, into another directory:",
    "repeat_ds": (
        "It was trained by the engine {engine} on {ranks} ranks: start it with the same DeepSpeed file and as many "
        "ranks."
    ),
    "repeat_report": "Score it, and write this report:",
    "recipe": "The whole recipe", "fingerprints": "SHA-256 of what went in",
    "fingerprint_data": "training and validation rows",
    "fingerprint_test": "test rows", "fingerprint_tokenizer": "tokenizer",
    "fingerprint_chat_template": "chat template",
    "fingerprint_base": "base weights", "fingerprint_schedule": "mask",
    # methods
    "methods": "Methods, to paste into a paper",
    "m_model": (
        "We fine-tuned {base} (revision {revision}, SHA-256 of its weights {sha}) in part with Frostline {version}."
    ),
    "m_unpinned": "unpinned",
    "m_mask_share": "Of {total} parameters {trained} ({share}) were trained, selected by {mask}; {line}",
    "m_rotation": "They took turns by {paper}: {blocks} block(s) at a time, for {steps} optimizer steps.",
    "m_rotation_lisa": "LISA (arXiv 2403.17919), with embeddings and head throughout",
    "m_rotation_badam": "BAdam (arXiv 2404.02827), each turn with fresh moments",
    "m_rotation_frostline": "random draws above the frost line",
    "m_mask_only": "{trained} parameters were trained, selected by {mask}; {line}",
    "m_line": "embeddings and the lowest {boundary} of {blocks} transformer blocks were frozen.",
    "m_line_head": "the lowest {boundary} of {blocks} transformer blocks were frozen.",
    "m_line_none": "no block was frozen as a whole.",
    "m_data": (
        "Training took {rows} rows of {source} (task {task}), of at most {length} tokens each; the loss was the mean "
        "over the supervised tokens."
    ),
    "m_validation_share": "{share} of the rows were held out for validation (seed {seed}).",
    "m_validation_set": "A separate set served for validation.",
    "m_test_share": "{share} of the rows were held out as a test set.",
    "m_test_set": "A separate test set was held out.",
    "m_folds": "Rows were dealt into {count} folds (seed {seed}).",
    "m_group": "Rows of one {group} stayed on one side of the split.",
    "m_optimizer": (
        "We used {optimizer} (β₁ = {beta1}, β₂ = {beta2}, ε = {eps}, weight decay {decay}) at a peak learning rate of "
        "{rate}, with linear warmup over {warmup} of the steps and then {schedule}; gradients were {clip}."
    ),
    "m_clip": "clipped to a norm of {norm}", "m_no_clip": "not clipped", "schedule_linear": "linear decay to 0",
    "schedule_cosine": "cosine decay to 0",
    "schedule_constant_with_warmup": "a constant rate",
    "m_epochs": (
        "Each step took {batch} rows; {steps} steps, at most {epochs} epochs, were done in {dtype} with float32 "
        "master weights (seed {seed})."
    ),
    "m_evaluation": (
        "The weights of step {step} were evaluated on {rows} rows{held_out}, against {against}. The metric declared "
        "beforehand was {metric}."
    ),
    "m_evaluation_folds": (
        "The folds were evaluated on {rows} rows{held_out}, against {against}. The metric declared beforehand was "
        "{metric}."
    ),
    "m_held_out": " that were held out from training",
    "m_nothing": "no other model",
    "m_bootstrap": (
        "Intervals are 95% percentile intervals of {resamples} bootstrap resamples of the rows, or of their groups; "
        "differences are paired. Verdicts at 5% on other metrics were adjusted by Holm's method; below {least} "
        "independent rows nothing was claimed."
    ),
    "m_versions": "Software: {versions}.",
    "footer": (
        "The licence and the intended use are those of the base model. Rows and answers in this file are as private as "
        "the data."
    ),
}  # fmt: skip
"""By key; ``{name}`` is where a value stands."""
