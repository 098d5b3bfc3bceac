"""The private names of Keras that tfzero uses, a row for each. See `host/registry.py`."""

from tfzero.host.registry import rows

KERAS = "at least Keras 3.10"
_REPLACED = "`training/walk.py` does it itself; an override would have no effect, and is refused"
_TRAINER = "keras.src.backend.tensorflow.trainer.TensorFlowTrainer"
_EPOCHS = "keras.src.backend.tensorflow.trainer.TFEpochIterator"
_MODEL = "keras.src.trainers.trainer.Trainer"
_OPTIMIZERS = "keras.src.optimizers"
_OPTIMIZER = f"{_OPTIMIZERS}.base_optimizer.BaseOptimizer"
_TF_OPTIMIZER = "keras.src.backend.tensorflow.optimizer.TFOptimizer"
_SCALED = f"{_OPTIMIZERS}.loss_scale_optimizer.LossScaleOptimizer"
_LOSSES = "keras.src.losses"
_CALLBACKS = "keras.src.callbacks"
_SAVING = "keras.src.saving.saving_lib"

ROWS = (
    # Models and how they are trained.
    *rows(
        _MODEL,
        KERAS,
        "test_loss_and_rows_of_a_training_step",
        {
            "(object)": "`compile` decides about the optimizer",
        },
    ),
    *rows(
        _MODEL,
        KERAS,
        "test_parts_of_models_and_callbacks",
        {
            "_loss_tracker": "counts samples; `metrics` need not list it",
            "_compile_loss": "whether there is a compiled loss",
        },
    ),
    *rows(
        _MODEL,
        KERAS,
        "test_where_fit_begins",
        {
            "_initial_epoch": "the epoch from which `fit` goes on",
        },
    ),
    *rows(
        _TRAINER,
        KERAS,
        "test_parts_of_models_and_callbacks",
        {
            "_distribute_strategy": "the strategy under which a model was made",
        },
    ),
    *rows(
        _TRAINER,
        KERAS,
        "test_evaluation_within_fit",
        {
            "fit:_use_cached_eval_dataset": "`fit` evaluates with what has been agreed on",
        },
    ),
    *rows(
        "",
        KERAS,
        "test_hidden_settings",
        {
            "keras.src.layers.layer.Layer._flatten_layers(self include_self recursive)": "layers within layers",
        },
    ),
    *rows(
        "",
        KERAS,
        "test_a_frozen_variable_was_made_to_be_trained",
        {
            "keras.src.layers.layer.Layer._trainable_variables": "those that are frozen now as well",
        },
    ),
    *rows(
        "",
        KERAS,
        "test_inputs_of_a_model",
        {
            "keras.src.models.sequential.Sequential._functional": "the inputs of a model",
            "keras.src.ops.function.Function._inputs_struct": "the inputs of a model, in their structure",
        },
    ),
    *rows(
        "",
        KERAS,
        "test_stage3.py::test_mixed_precision_moves_half_the_bytes",
        {
            "keras.src.backend.common.variables.AutocastScope(object)": (
                "a parameter in shards travels in the dtype of a layer"
            ),
        },
    ),
    *rows(
        "",
        KERAS,
        "test_where_keras_finds_what_recomputes",
        {
            "keras.src.backend.core": "where `keras.remat` finds its function, wherever the module comes to stand",
        },
    ),
    *rows(
        "",
        KERAS,
        "test_remake",
        {
            "keras.src.backend.common.variables.Variable._initialize(self value)": (
                "a variable becomes the strategy's in place"
            ),
        },
    ),
    # The loop over epochs.
    *rows(
        _EPOCHS,
        KERAS,
        "test_private_methods_override_something",
        {
            "(EpochIterator)": "a run goes on from its place in the data",
        },
    ),
    *rows(
        _EPOCHS,
        KERAS,
        "test_batches_that_are_passed_over",
        {
            "_enumerate_iterator(self)": "passes over batches that a checkpoint has behind it",
            "_get_iterator(self)": "the next epoch has its own order",
            "_current_iterator": "the next epoch has its own order",
        },
    ),
    *rows(
        _EPOCHS,
        KERAS,
        "test_what_is_called_has_these_arguments",
        {
            "catch_stop_iteration(self)": "an empty epoch is an error",
        },
    ),
    *rows(
        _EPOCHS,
        KERAS,
        "test_the_loop_over_epochs",
        {
            "_distributed_dataset": "the data set of a loop",
            "_num_batches": "whether the length of an epoch is known",
            "_steps_seen": "whether a batch has been drawn",
        },
    ),
    # Losses and metrics.
    *rows(
        _LOSSES,
        KERAS,
        "test_what_is_called_has_these_arguments",
        {
            "loss.standardize_reduction(reduction)": (
                "a loss is reduced as Keras reduces it, by the divisor of all replicas"
            ),
            "loss.squeeze_or_expand_to_same_rank(x1 x2 expand_rank_1)": (
                "a loss is reduced as Keras reduces it, by the divisor of all replicas"
            ),
        },
    ),
    *rows(
        _LOSSES,
        KERAS,
        "test_hidden_settings",
        {
            "losses.LossFunctionWrapper._fn_kwargs": "settings that are no part of the config",
        },
    ),
    *rows(
        "",
        KERAS,
        "test_hidden_settings",
        {
            "keras.src.metrics.reduction_metrics.MeanMetricWrapper._fn_kwargs": (
                "settings that are no part of the config"
            ),
        },
    ),
    # Files and callbacks.
    *rows(
        _SAVING,
        KERAS,
        "test_keras_files.py::test_one_worker_writes",
        {
            "H5IOStore(object)": "stands for a file where another worker writes",
        },
    ),
    *rows(
        _SAVING,
        KERAS,
        "test_what_is_called_has_these_arguments",
        {
            "_save_state(saveable weights_store assets_store inner_path visited_saveables)": (
                "walks over a model as the worker does that writes"
            ),
        },
    ),
    *rows(
        "keras.src.export.saved_model.ExportArchive",
        KERAS,
        "test_distributed_variables_of_what_is_saved",
        {
            "_filter_and_track_resources:_all_variables": "the variables of an export",
        },
        until="3.13",
    ),
    *rows(
        "keras.src.export.saved_model_export_archive.SavedModelExportArchive",
        "Keras 3.14",
        "test_distributed_variables_of_what_is_saved",
        {
            "_filter_and_track_resources:_all_variables": "the variables of an export",
        },
    ),
    *rows(
        _CALLBACKS,
        KERAS,
        "test_what_is_called_has_these_arguments",
        {
            "model_checkpoint.ModelCheckpoint._get_file_path(self epoch batch logs)": "where it writes next",
            "tensorboard.TensorBoard._close_writers(self)": "ends what one worker only writes",
        },
    ),
    *rows(
        _CALLBACKS,
        KERAS,
        "test_parts_of_models_and_callbacks",
        {
            "backup_and_restore.BackupAndRestore._weights_path": "where weights are written",
        },
    ),
    # Optimizers: what the wrapper uses of the inner optimizer.
    *rows(
        _OPTIMIZER,
        KERAS,
        "test_overrides_of_what_is_replaced",
        {
            "(KerasSaveable)": "its methods are known by their class",
        },
    ),
    *rows(
        _SCALED,
        KERAS,
        "test_overrides_of_what_is_replaced",
        {
            "(Optimizer)": "its methods are known by their class",
        },
    ),
    *rows(
        _OPTIMIZERS,
        "Keras 3.15",
        "test_multi_optimizer",
        {
            "multi_optimizer.MultiOptimizer(Optimizer)": "chooses one of several optimizers",
            "multi_optimizer.MultiOptimizer._optimizer_map": "chooses one of several optimizers",
        },
    ),
    *rows(
        _OPTIMIZER,
        KERAS,
        "test_what_is_called_has_these_arguments",
        {
            "update_step(self gradient variable learning_rate)": "is called with parts of variables",
        },
    ),
    *rows(
        _OPTIMIZER,
        KERAS,
        "test_parts_of_an_optimizer",
        {
            "_iterations": "`iterations` divides by the accumulation steps",
            "_variables": "what an optimizer makes in its constructor",
            "_accumulated_gradients": "the accumulator of a variable",
            "_model_variables_moving_average": "the moving average of a variable",
            "_get_variable_index(self variable)": "the place of a variable",
            "_apply_weight_decay(self variables)": "decays a part of a variable",
            "_use_weight_decay(self variable)": "servers decay parts, and do not know the variable",
        },
    ),
    *rows(
        _OPTIMIZER,
        KERAS,
        "test_adopt",
        {
            "_trainable_variables": "what an optimizer trains",
        },
    ),
    *rows(
        _OPTIMIZER,
        KERAS,
        "test_hidden_settings",
        {
            "_learning_rate": "the schedule behind `learning_rate`",
        },
    ),
    *rows(
        _OPTIMIZER,
        KERAS,
        "test_begin_update",
        {
            "_backend_update_step(self grads trainable_variables learning_rate)": "Nadam keeps a product there",
        },
    ),
    *rows(
        _TF_OPTIMIZER,
        KERAS,
        "test_adopt",
        {
            "_distribution_strategy": "slots are made and updated by way of it",
        },
    ),
    *rows(
        _TF_OPTIMIZER,
        KERAS,
        "test_parts_of_models_and_callbacks",
        {
            "_var_key:_distributed_container": "by which slots are found",
        },
    ),
    # Optimizers: parts of `apply` that the walk of a gradient replaces.
    *rows(
        _OPTIMIZER,
        KERAS,
        "test_overrides_of_what_is_replaced",
        {
            "_backend_apply_gradients(self grads trainable_variables)": _REPLACED,
            "_clip_gradients(self grads)": _REPLACED,
            "_clip_by_norm(self values axes)": _REPLACED,
            "_backend_reset_gradient_accumulators(self)": _REPLACED,
            "_backend_increment_gradient_accumulators(self grads acc_grads)": _REPLACED,
            "_filter_empty_gradients(self grads vars)": _REPLACED,
            "_overwrite_variables_directly_with_gradients(self grads vars)": _REPLACED,
            "_overwrite_model_variables_with_average_value(self trainable_variables)": _REPLACED,
            "_update_model_variables_moving_average(self trainable_variables)": _REPLACED,
        },
    ),
    *rows(
        _SCALED,
        KERAS,
        "test_overrides_of_what_is_replaced",
        {
            "_tf_apply(self grads trainable_variables)": _REPLACED,
            "_stateful_handle_finite_grads(self grads trainable_variables)": _REPLACED,
        },
    ),
)
