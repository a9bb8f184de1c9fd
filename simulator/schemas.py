"""The formats of a ``.pte`` and of a Vulkan delegate inside it.

Written down from ``schema/program.fbs`` and ``backends/vulkan/serialization/schema.fbs`` of
ExecuTorch 1.5; ``tests/simulator/test_schemas.py`` compares them with the installed ones.
"""

from __future__ import annotations

from edgepass.simulator.flatbuffer import Field, Schema


def _fields(text: str) -> tuple[Field, ...]:
    """Read ``name:type`` and ``name:type=default`` parted by spaces."""
    fields = []
    for part in text.split():
        name, kind = part.split(":")
        kind, _, default = kind.partition("=")
        fields.append(Field(name, kind, int(default or 0)))
    return tuple(fields)


PROGRAM = Schema(
    identifier=b"ET12",
    tables={
        "ContainerMetadata": _fields("encoded_inp_str:string encoded_out_str:string"),
        "Null": (),
        "AllocationDetails": _fields(
            "memory_id:uint memory_offset_low:uint memory_offset_high:uint"
        ),
        "ExtraTensorInfo": _fields(
            "mutable_data_segments_idx:ulong fully_qualified_name:string location:byte "
            "device_type:byte device_index:byte"
        ),
        "Tensor": _fields(
            "scalar_type:byte storage_offset:int sizes:[int] dim_order:[ubyte] requires_grad:bool "
            "data_buffer_idx:uint allocation_info:AllocationDetails layout:byte "
            "shape_dynamism:byte extra_tensor_info:ExtraTensorInfo"
        ),
        "Int": _fields("int_val:long"),
        "Bool": _fields("bool_val:bool"),
        "Double": _fields("double_val:double"),
        "String": _fields("string_val:string"),
        "IntList": _fields("items:[long]"),
        "DoubleList": _fields("items:[double]"),
        "BoolList": _fields("items:[bool]"),
        "TensorList": _fields("items:[int]"),
        "OptionalTensorList": _fields("items:[int]"),
        "EValue": _fields("val:KernelTypes"),
        "Operator": _fields("name:string overload:string"),
        "KernelCall": _fields("op_index:int args:[int]"),
        "DelegateCall": _fields("delegate_index:int args:[int]"),
        "MoveCall": _fields("move_from:int move_to:int"),
        "JumpFalseCall": _fields("cond_value_index:int destination_instruction:int"),
        "FreeCall": _fields("value_index:int"),
        "Instruction": _fields("instr_args:InstructionArguments"),
        "Frame": _fields("filename:string lineno:int name:string context:string"),
        "FrameList": _fields("items:[Frame]"),
        "BackendDelegateDataReference": _fields("location:byte index:uint"),
        "CompileSpec": _fields("key:string value:[ubyte]"),
        "BackendDelegate": _fields(
            "id:string processed:BackendDelegateDataReference compile_specs:[CompileSpec]"
        ),
        "Chain": _fields(
            "inputs:[int] outputs:[int] instructions:[Instruction] stacktrace:[FrameList]"
        ),
        "ExecutionPlan": _fields(
            "name:string container_meta_type:ContainerMetadata values:[EValue] inputs:[int] "
            "outputs:[int] chains:[Chain] operators:[Operator] delegates:[BackendDelegate] "
            "non_const_buffer_sizes:[long] non_const_buffer_device:[NonConstBufferDevice]"
        ),
        "NonConstBufferDevice": _fields("buffer_idx:int device_type:byte device_index:byte"),
        "Buffer": _fields("storage:[ubyte]"),
        "BackendDelegateInlineData": _fields("data:[ubyte]"),
        "DataSegment": _fields("offset:ulong size:ulong"),
        "SubsegmentOffsets": _fields("segment_index:uint offsets:[ulong]"),
        "NamedData": _fields("key:string segment_index:uint"),
        "Program": _fields(
            "version:uint execution_plan:[ExecutionPlan] constant_buffer:[Buffer] "
            "backend_delegate_data:[BackendDelegateInlineData] segments:[DataSegment] "
            "constant_segment:SubsegmentOffsets mutable_data_segments:[SubsegmentOffsets] "
            "named_data:[NamedData]"
        ),
    },
    unions={
        "KernelTypes": (
            *("Null", "Int", "Bool", "Double", "Tensor", "String", "IntList", "DoubleList"),
            *("BoolList", "TensorList", "OptionalTensorList"),
        ),
        "InstructionArguments": (
            *("KernelCall", "DelegateCall", "MoveCall", "JumpFalseCall", "FreeCall"),
        ),
    },
)

VULKAN = Schema(
    identifier=b"VK00",
    tables={
        "OperatorCall": _fields("node_id:uint name:string args:[int]"),
        "VkTensor": _fields(
            "datatype:byte dims:[uint] constant_id:int mem_obj_id:int storage_type:ubyte=255 "
            "memory_layout:ubyte=255 staging_datatype:byte=127"
        ),
        "Null": (),
        "Int": _fields("int_val:long"),
        "Bool": _fields("bool_val:bool"),
        "Double": _fields("double_val:double"),
        "String": _fields("string_val:string"),
        "IntList": _fields("items:[long]"),
        "DoubleList": _fields("items:[double]"),
        "BoolList": _fields("items:[bool]"),
        "ValueList": _fields("items:[int]"),
        "SymInt": _fields("value:int"),
        "VkValue": _fields("value:GraphTypes"),
        "VkBytes": _fields("offset:ulong length:ulong named_key:string"),
        "VkGraph": _fields(
            "version:string chain:[OperatorCall] values:[VkValue] input_ids:[uint] "
            "output_ids:[uint] constants:[VkBytes] shaders:[VkBytes] "
            "storage_type_override:ubyte=255 memory_layout_override:ubyte=255"
        ),
    },
    unions={
        "GraphTypes": (
            *("Null", "Int", "Double", "Bool", "VkTensor", "IntList", "DoubleList", "BoolList"),
            *("ValueList", "String", "SymInt"),
        )
    },
)
