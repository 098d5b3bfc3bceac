"""The private names of TensorFlow that tfzero uses, a row for each. See `host/registry.py`."""

from tfzero.host.registry import rows

# "At least" where no earlier release was looked at. For the others the modules' syntax trees were compared, from 2.16.2
# to 2.21.0.
TENSORFLOW = "at least TensorFlow 2.18"
DISTRIBUTED = "TensorFlow 2.16"
_DISTRIBUTE = "tensorflow.python.distribute"
_EXTENDED = f"{_DISTRIBUTE}.collective_all_reduce_strategy.CollectiveAllReduceExtended"
_VALUES = f"{_DISTRIBUTE}.values"
_MIRRORED = f"{_VALUES}.MirroredVariable"
_EAGER = "tensorflow.python.eager"
_AUTOMATIC = "tensorflow.python.framework.auto_control_deps"
_OPERATION = "tensorflow.python.framework.ops.Operation"
_CONVERTED = "a function of ours is converted as what it stands for"
_OPS = "tensorflow.python.ops"

ROWS = (
    # What TensorFlow asks of a strategy; `host/distributed.py` overrides it.
    *rows(
        _EXTENDED,
        DISTRIBUTED,
        "test_private_methods_override_something",
        {
            "(MirroredExtended)": (
                "knows clusters, runs replicas and reads input; there is no public class to derive from"
            ),
            "_use_merge_call(self)": "replicas meet by `merge_call` only where they run one after the other",
            "_call_for_each_replica(self fn args kwargs)": "what depends on rows is followed in each replica",
            "_replica_ctx_all_reduce(self reduce_op value options)": "by the group's collectives, in any graph",
            "_reduce_to(self reduce_op value destinations options)": "by the group's collectives",
            "_batch_reduce_to(self reduce_op value_destination_pairs options)": "by the group's collectives",
            "_gather_to_implementation(self value destinations axis options)": (
                "by the group's collectives, of parts of any length"
            ),
            "_batch_gather_to(self value_destination_pairs axis options)": (
                "by the group's collectives, of parts of any length"
            ),
            "_validate_colocate_with_variable(self colocate_with_variable)": (
                "a slot is made beside what stands for a variable"
            ),
            "_create_variable(self next_creator kwargs)": (
                "variables are made as replicas hold them, whole or in shards"
            ),
            "_initialize_local_devices(self cluster_resolver worker_device)": (
                "the stock strategy takes one CPU device a process"
            ),
            "_experimental_distribute_dataset(self dataset options)": (
                "batches are cut by rows, and shuffled alike on all workers"
            ),
        },
    ),
    *rows(
        _EXTENDED,
        DISTRIBUTED,
        "test_attributes_of_the_extended",
        {
            "_container_strategy(self)": "the strategy behind which it is",
            "_std_server_started": "TensorFlow's server runs once in a process",
            "_enable_check_health": "`collectives/pulse.py` watches instead",
        },
    ),
    # Replicas: their threads, their values, their variables.
    *rows(
        _DISTRIBUTE,
        DISTRIBUTED,
        "test_places_of_replicas",
        {
            "mirrored_run._MirroredReplicaContext._replica_id(self)": "the local index of a replica",
            "mirrored_run._MirroredReplicaThread.main_args": "what a replica was given: the rows of its batch",
            "mirrored_run._MirroredReplicaThread.main_kwargs": "what a replica was given: the rows of its batch",
            "mirrored_run._MirroredReplicaThread.graph": "the graph in which a replica is traced",
        },
    ),
    *rows(
        _DISTRIBUTE,
        DISTRIBUTED,
        "test_private_methods_override_something",
        {
            "distribute_utils.create_mirrored_variable(strategy real_mirrored_creator class_mapping "
            "policy_mapping kwargs)": ("builds a distributed variable from components"),
        },
    ),
    *rows(
        _DISTRIBUTE,
        DISTRIBUTED,
        "test_values_of_replicas",
        {
            "distribute_utils.regroup(values wrap_class always_wrap)": "makes per-replica and mirrored values",
        },
    ),
    *rows(
        _DISTRIBUTE,
        DISTRIBUTED,
        "test_distributed_variables_of_what_is_saved",
        {
            "distribute_utils.value_container(val)": "the distributed variable that a component belongs to",
        },
    ),
    *rows(
        _VALUES,
        DISTRIBUTED,
        "test_values_of_replicas",
        {
            "Mirrored(DistributedDelegate Mirrored)": "one equal value for each local replica",
        },
    ),
    *rows(
        _VALUES,
        DISTRIBUTED,
        "test_parts_of_a_batch_stay_so_through_functions_and_data_sets",
        {
            "PerReplica(DistributedValues CompositeTensor PerReplica)": (
                "carries how many rows of the batch a replica has, also through data sets"
            ),
            "PerReplica._type_spec(self)": "tells functions and data sets of the rows",
            "PerReplica._values": "one for each replica",
            "PerReplicaSpec._to_components(self value)": "takes the rows along",
            "PerReplicaSpec._from_components(self tensor_list)": "takes the rows along",
        },
    ),
    *rows(
        _VALUES,
        DISTRIBUTED,
        "test_specs_of_elements",
        {
            "PerReplicaSpec(TypeSpec)": "of `PerReplica`",
            "PerReplicaSpec._value_specs": "the specs of what each replica gets",
        },
    ),
    *rows(
        _VALUES,
        DISTRIBUTED,
        "test_a_plain_variable_in_a_scope",
        {
            "DistributedVariable(DistributedDelegate Variable Tensor)": "what a variable with components is known by",
        },
    ),
    *rows(
        _VALUES,
        DISTRIBUTED,
        "test_the_variable_of_a_handle",
        {
            "DistributedVariable.__init__:_distributed_container": (
                "a handle's note of the variable that it is a component of"
            ),
        },
    ),
    *rows(
        _VALUES,
        DISTRIBUTED,
        "test_private_methods_override_something",
        {
            "DistributedVariable._get_on_device_or_primary(self)": "the component of the replica that is run",
            "SyncOnReadVariable(DistributedVariable)": "what replicas count up by themselves derives from it",
        },
    ),
    *rows(
        _MIRRORED,
        DISTRIBUTED,
        "test_private_methods_override_something",
        {
            "(DistributedVariable Mirrored)": "replicated variables and those in shards derive from it",
            "_get(self)": "reading a parameter in shards gathers it",
            "_get_cross_replica(self)": "outside replicas a variable in shards is whole",
            "_dense_var_to_tensor(self dtype name as_ref)": "reading a parameter in shards gathers it",
            "_update_replica(self update_fn value kwargs)": "all replicas take what one device would have computed",
            "_update_cross_replica(self update_fn value kwargs)": "each component takes its part",
            "_export_to_saved_model_graph(self object_map tensor_map options kwargs)": (
                "a SavedModel has ordinary variables"
            ),
        },
    ),
    *rows(
        _OPS,
        TENSORFLOW,
        "test_a_plain_variable_in_a_scope",
        {
            "resource_variable_ops.ResourceVariable(BaseResourceVariable CompositeTensor)": (
                "a variable that no strategy's scope turns into another kind"
            ),
        },
    ),
    # The process: its devices, its collectives between workers, its seed.
    *rows(
        _EAGER,
        TENSORFLOW,
        "test_state_of_the_runtime",
        {
            "context.context()": "TensorFlow's collectives and its own watch are configured there alone",
            "context.Context._initialized": "collectives cannot be configured after devices are made",
            "context.Context._collective_ops_server_def": "whether TensorFlow's server already runs",
            "context.Context.abort_collective_ops(self code message)": (
                "ends collectives in which a lost worker is awaited"
            ),
        },
    ),
    *rows(
        _EAGER,
        TENSORFLOW,
        "test_the_stock_strategy_leaves_a_coordination_service_that_is_configured",
        {
            "context.Context.configure_coordination_service(self service_type service_leader "
            "enable_health_check cluster_register_timeout_in_ms heartbeat_timeout_in_ms "
            "shutdown_barrier_timeout_in_ms coordinated_jobs allow_new_incarnation_to_reconnect)": (
                "leaves TensorFlow's own watch out"
            ),
            "context.Context.coordination_service(self)": "whether TensorFlow's own watch is left out",
        },
    ),
    *rows(
        _EAGER,
        TENSORFLOW,
        "test_nccl_is_configured_by_way_of_the_stock_strategy",
        {
            "context.Context.configure_collective_ops(self collective_leader scoped_allocator_enabled_ops "
            "use_nccl_communication device_filters)": (
                "NCCL between processes, which the stock strategy does not ask for"
            ),
            "context.Context.config(self)": "whether NCCL is configured",
        },
    ),
    *rows(
        _EAGER,
        TENSORFLOW,
        "test_random_state",
        {
            "context.global_seed()": "`tf.random.set_seed` has no way back",
        },
    ),
    # Tapes and graphs that are being traced.
    *rows(
        _EAGER,
        TENSORFLOW,
        "test_a_tape_takes_a_value_for_what_was_read",
        {
            "tape.variable_accessed(variable)": "lets tapes know of a variable that is read as shards",
            "record.record_operation(op_type output_tensors input_tensors backward_function forward_function)": (
                "a gathered value has the gradient of the shard"
            ),
            "record.stop_recording()": "no tape follows how a value is gathered",
        },
    ),
    *rows(
        _EAGER,
        TENSORFLOW,
        "test_is_recorded",
        {
            "record.could_possibly_record()": "whether a tape knows how a value was made",
            "record.should_record_backprop(tensors)": "whether a tape knows how a value was made",
        },
    ),
    *rows(
        _EAGER,
        TENSORFLOW,
        "test_gradient_tapes_know_of_operations_that_are_repeated",
        {
            "execute.must_record_gradient()": "an operation that is made anew is recorded",
            "execute.record_gradient(op_name inputs attrs outputs)": "an operation that is made anew is recorded",
        },
    ),
    *rows(
        _EAGER,
        TENSORFLOW,
        "test_a_function_of_another_one_has_its_options",
        {
            "polymorphic_function.polymorphic_function.Function._clone(self python_function)": (
                "a `tf.function` of another Python function with the same options"
            ),
        },
    ),
    *rows(
        _AUTOMATIC,
        DISTRIBUTED,
        "test_what_orders_an_operation",
        {
            "register_acd_resource_resolver(f)": (
                "each device has a chain of its own for operations without a resource"
            ),
            "op_is_stateful(op)": "which operations will wait for which",
            "_get_resource_inputs(op)": "which operations will wait for which",
            "ResourceType.READ_WRITE": "which operations will wait for which",
            "ops.tensor_id(tensor)": "a number for a resource",
            "AutomaticControlDependencies.run_independently:_independent_side_effects": (
                "an operation that waits for its inputs alone"
            ),
        },
    ),
    *rows(
        _OPERATION,
        TENSORFLOW,
        "test_run_after",
        {
            "_add_control_input": "`tf.control_dependencies` only serves new operations",
        },
    ),
    *rows(
        _OPERATION,
        TENSORFLOW,
        "test_what_a_second_gather_is_made_of",
        {
            "_update_input(self index tensor)": "a backward operation takes a value that is gathered anew",
            "_id(self)": "the order in which operations were made",
        },
    ),
    *rows(
        "",
        TENSORFLOW,
        "test_functions_of_operations",
        {
            "tensorflow.python.framework.ops.Graph._get_function(self name)": "the functions that operations call",
        },
    ),
    *rows(
        _OPS,
        TENSORFLOW,
        "test_graphs_around_control_flow",
        {
            "control_flow_v2_func_graphs.ControlFlowFuncGraph(FuncGraph)": (
                "branches and loops have graphs of their own"
            ),
        },
    ),
    *rows(
        _OPS,
        TENSORFLOW,
        "test_a_loop_is_known_where_it_is_traced",
        {
            "control_flow_v2_func_graphs.WhileBodyFuncGraph(ControlFlowFuncGraph)": "nothing is gathered within loops",
        },
    ),
    *rows(
        "",
        TENSORFLOW,
        "test_values_are_told_from_symbols",
        {
            "tensorflow.__internal__.CompositeTensor": "sparse and ragged tensors and others of several parts",
            "tensorflow.__internal__.EagerTensor(_EagerTensorBase)": "tells values from symbols in a graph",
        },
    ),
    *rows(
        "",
        TENSORFLOW,
        "test_a_function_of_another_one_has_its_options",
        {
            "tensorflow.__internal__.autograph.tf_convert(f ctx convert_by_default user_requested)": _CONVERTED,
            "tensorflow.__internal__.autograph.control_status_ctx()": _CONVERTED,
        },
    ),
    *rows(
        "",
        TENSORFLOW,
        "test_a_tensor_is_computed_outside_its_graph",
        {
            "tensorflow.__internal__.lift_to_graph(tensors graph sources disallowed_placeholders "
            "add_sources handle_captures base_graph op_map)": "initial values of variables made in a trace",
            "tensorflow.python.ops.op_selector.UnliftableError(Exception)": "initial values of a trace's arguments",
        },
    ),
)
