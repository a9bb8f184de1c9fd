"""Random small blocks of quantized linears, as Hypothesis draws them."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from tests.passes.quantized_programs import Form, QuantizedLinear

MOST_TOKENS = 64


@dataclass(frozen=True)
class Block:
    """Linears of one activation ``[*lead, tokens, K]``, run with each of ``counts`` tokens.

    ``lead`` None gives an activation ``[K]``. ``front`` folds the input's columns, ``views`` each
    result's; ``twice`` calls each linear twice. ``table`` puts a lookup in the first linear's
    weight in front: an embedding tied to a head. Its ids are ``[*lead, tokens]``.
    """

    forms: tuple[Form, ...]
    lead: tuple[int, ...] | None = (1,)
    counts: tuple[int, ...] = (5, 2)
    front: bool = False
    views: bool = False
    twice: bool = False
    table: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def k(self) -> int:
        return self.forms[0].columns

    @property
    def parts(self) -> int:
        """Into how many parts ``front`` folds the input's columns."""
        return parts_of(self.k)


class BlockModule(nn.Module):
    def __init__(self, block: Block):
        super().__init__()
        self.block = block
        self.linears = nn.ModuleList(QuantizedLinear(form, i) for i, form in enumerate(block.forms))

    def forward(self, x: Tensor) -> list[Tensor]:
        block, results = self.block, []
        if block.table:
            x = nn.functional.embedding(x, self.linears[0].dequantized())
        elif block.front:
            x = x.flatten(-2)
        for linear in self.linears:
            for y in (x, -x) if block.twice else (x,):
                y = linear(y)
                results.append(folded(y) if block.views else y)
        return results

    def activation(self, given: Tensor) -> Tensor:
        """The activation of the linears, as the lowered program should see it."""
        if not self.block.table:
            return given.flatten(-2) if self.block.front else given
        rows = self.linears[0].float64_weight()[given]
        return rows.to(torch.float16 if self.block.dtype == torch.float16 else torch.float32)


def folded(y: Tensor) -> Tensor:
    """The user's own view and transpose behind a linear."""
    parts = parts_of(y.shape[-1])
    return y.view(*y.shape[:-1], parts, -1).transpose(-1, -2)


def parts_of(n: int) -> int:
    return next(parts for parts in (4, 3, 2, 1) if n % parts == 0)


def example(block: Block, count: int) -> Tensor:
    """An input of ``count`` tokens."""
    generator = torch.Generator().manual_seed(count)
    tokens = () if block.lead is None else (*block.lead, count)
    if block.table:
        return torch.randint(block.forms[0].rows, tokens, generator=generator)
    columns = (block.parts, block.k // block.parts) if block.front else (block.k,)
    return torch.randn(*tokens, *columns, generator=generator).to(block.dtype)


def export_block(block: Block) -> ExportedProgram:
    """Export a block with a dynamic token count, if it has tokens."""
    module, dynamic = BlockModule(block).eval(), None
    if block.lead is not None:
        dynamic = ({len(block.lead): Dim("tokens", min=1, max=MOST_TOKENS)},)
    with torch.no_grad():
        return export(module, (example(block, 7),), dynamic_shapes=dynamic)


@st.composite
def forms(draw: st.DrawFn, group: int, columns: int, dtype: torch.dtype) -> Form:
    # PT2E's weight by channels gives float32 whatever the model is, and it has no groups of one.
    only_torchao = dtype != torch.float32 or group == 1
    dialects = ["torchao"] if only_torchao else ["torchao", "decomposed"]
    low, high = draw(st.sampled_from([(-8, 7), (-7, 7), (0, 15)]))
    return Form(
        dialect=draw(st.sampled_from(dialects)),
        rows=draw(st.one_of(st.integers(1, 24), st.integers(1, 300))),
        columns=columns,
        group=group,
        asymmetric=draw(st.booleans()),
        bias=draw(st.booleans()),
        dynamic=columns > 1 and draw(st.booleans()),  # torchao's own form cannot be exported
        low=low,
        high=high,
        dtype=dtype,
    )


_GROUPS = st.one_of(st.integers(1, 64), st.sampled_from([96, 100, 128, 256]), st.just(300))
_DTYPES = st.sampled_from([torch.float32] * 3 + [torch.float16, torch.bfloat16])


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Linears of one activation of rank 1 to 4."""
    group, dtype = draw(_GROUPS), draw(_DTYPES)
    columns = group * draw(st.integers(1, max(1, 300 // group)))
    lead = draw(st.sampled_from([None, (), (1,), (2,), (1, 1), (2, 2)]))
    wide = lead is not None and len(lead) == 2  # the runtime has no more than four dimensions
    return Block(
        tuple(draw(st.lists(forms(group, columns, dtype), min_size=1, max_size=2))),
        lead=lead,
        counts=draw(_counts()),
        front=not wide and draw(st.booleans()),
        views=not wide and draw(st.booleans()),
        twice=draw(st.booleans()),
        dtype=dtype,
    )


@st.composite
def tied_blocks(draw: st.DrawFn) -> Block:
    """A lookup in a table, and the linear that shares its weight."""
    group, dtype = draw(st.integers(1, 64)), draw(_DTYPES)
    columns = group * draw(st.integers(1, max(1, 160 // group)))
    if draw(st.booleans()):  # what the runtime's lookup takes
        group, columns = draw(st.sampled_from([(32, 96), (4, 64), (16, 32), (64, 128)]))
    form = draw(forms(group, columns, dtype))
    if draw(st.booleans()):
        form = replace(form, asymmetric=False, low=min(form.low, -7), high=7)
    return Block(
        (form,),
        lead=draw(st.sampled_from([(), (1,), (2,)])),
        counts=draw(_counts()),
        views=draw(st.booleans()),
        twice=draw(st.booleans()),
        table=True,
        dtype=dtype,
    )


def _counts() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, MOST_TOKENS), min_size=2, max_size=3).map(tuple)
