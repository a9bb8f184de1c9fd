"""Components of quantized parameters become constants; what is none is refused with its reason."""

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import RewriteLog
from edgepass.passes.unwrap_parameters import unwrap_parameters
from tests.passes.programs import export, find, reasons

ACCESS = "export.access_subclass_inner_tensor"
X = torch.randn(3, 32)


def quantized() -> WorkingProgram:
    linear = nn.Sequential(nn.Linear(32, 8, bias=False))
    quantize_(linear, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(16)))
    return WorkingProgram(export(linear, (X,)))


def unwrapped(program: WorkingProgram) -> RewriteLog:
    log = RewriteLog()
    unwrap_parameters(program, log)
    program.graph.lint()
    return log


def test_components_share_the_parameters_memory() -> None:
    program = quantized()
    shown = {node.args[1]: program.constant(node) for node in find(program, ACCESS)}
    log = unwrapped(program)
    assert log.counts["unwrap-parameter"].applied == len(log.replacements) == 3
    for each in log.replacements:
        component = program.qualified_name(each.new).removeprefix("0.weight_")
        tensor = program.constant(each.new)
        assert type(tensor) is torch.Tensor
        assert tensor.data_ptr() == shown[component].data_ptr()


def test_a_second_access_takes_the_same_constant() -> None:
    program = quantized()
    access = find(program, ACCESS)[0]
    with program.graph.inserting_after(access):
        program.graph.node_copy(access)
    log = unwrapped(program)
    assert log.replacements[0].new is log.replacements[1].new


def test_a_component_of_what_is_no_parameter_stays() -> None:
    program = quantized()
    access = find(program, ACCESS)[0]
    access.update_arg(0, program.user_inputs[0])
    log = unwrapped(program)
    assert [len(found) for found in (find(program, ACCESS), log.refusals)] == [1, 1]
    (reason,) = reasons(log, "unwrap-parameter")
    assert reason.endswith("is no parameter")


def test_a_component_that_is_a_subclass_stays() -> None:
    program = quantized()
    access = find(program, ACCESS)[0]
    inner = program.constant(access.args[0])
    program.constant(access.args[0]).qdata = inner
    (reason,) = reasons(unwrapped(program), "unwrap-parameter")
    assert reason == f"the component is itself a {type(inner).__name__}"
