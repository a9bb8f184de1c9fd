"""Float forms of packed int4 weights, kept between calls so that a linear need not unpack again.

A form lives as long as the packed tensor that it was made from: the cache holds that tensor by a
weak reference only. A write to the packed weight, its scales or its zero points through torch is
noticed by the tensors' version counters (a write through ``.data`` or NumPy is not). Tensors made
under ``torch.inference_mode`` have no such counter, so that their forms are made anew each call.

All forms together take at most the limit, 2 GiB unless ``set_weight_cache_limit`` says otherwise.
A weight has a form for one token and one for more, 4 bytes a value each; where there is no room for
both, the one that is wanted takes the other's place. A weight that no longer fits is unpacked at
each call: slower, the same numbers. No other weight is evicted for it, because the layers of a
model take turns and would evict one another.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from edgepass.ops.checks import refuse

DEFAULT_LIMIT = 2 << 30

Versions = tuple[int, int, int]
Form = tuple[torch.Tensor, ...]


class PreparedWeight:
    """One packed weight ``[N, K]`` and its float forms, each made when it is first wanted.

    ``forms`` is keyed by kind; a form is one tensor or several that together are the weight.
    """

    def __init__(
        self,
        packed: "weakref.ref[torch.Tensor]",
        scales: torch.Tensor,
        zeros: torch.Tensor,
        group_size: int,
        versions: Versions | None,
    ) -> None:
        self.packed, self.scales, self.zeros = packed, scales, zeros
        self.group_size, self.versions = group_size, versions
        self.forms: dict[str, Form] = {}

    def describes(
        self, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int
    ) -> bool:
        """Whether the forms were made from these values."""
        return (
            self.packed() is packed
            and self.group_size == group_size
            and self.versions == _versions(packed, self.scales, self.zeros)
            and _same(self.scales, scales)
            and _same(self.zeros, zeros)
        )


class WeightCache:
    """Prepared weights by packed tensor. Safe to use from several threads."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self._entries: dict[int, PreparedWeight] = {}
        # Reentrant: a weak reference's callback may run in the middle of a locked section.
        self._lock = threading.RLock()

    def find(
        self, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int
    ) -> PreparedWeight:
        """The entry of a weight; a new one when there is none or when the weight was written to."""
        key = id(packed)
        entry = self._entries.get(key)
        if entry is not None and entry.describes(packed, scales, zeros, group_size):
            return entry
        watch = weakref.ref(packed, lambda reference: self._forget(key, reference))
        versions = _versions(packed, scales, zeros)
        entry = PreparedWeight(watch, scales, zeros, group_size, versions)
        if versions is not None:
            with self._lock:
                self._entries[key] = entry
        return entry

    def form(self, entry: PreparedWeight, kind: str, make: Callable[[], Form]) -> Form:
        """A form of an entry, made by ``make`` and kept if it fits."""
        found = entry.forms.get(kind)
        if found is not None:
            return found
        made = make()
        if entry.versions is None:
            return made
        with self._lock:
            room = self.limit - self.nbytes()
            if _nbytes(made) > room and _nbytes(made) <= room + _all_nbytes(entry):
                entry.forms.clear()
            if self.nbytes() + _nbytes(made) <= self.limit:
                entry.forms[kind] = made
        return made

    def nbytes(self) -> int:
        """Bytes that all kept forms take."""
        with self._lock:
            entries = list(self._entries.values())
            return sum(map(_all_nbytes, entries))

    def clear(self) -> None:
        """Drop every form."""
        with self._lock:
            for entry in list(self._entries.values()):
                entry.forms.clear()
            self._entries.clear()

    def _forget(self, key: int, reference: "weakref.ref[torch.Tensor]") -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.packed is reference:
                del self._entries[key]


weight_cache = WeightCache()


@contextmanager
def keep_no_forms() -> Iterator[None]:
    """Keep no new form for the duration: for a single run of a whole model, which reuses none."""
    before, weight_cache.limit = weight_cache.limit, 0
    try:
        yield
    finally:
        weight_cache.limit = before


def set_weight_cache_limit(nbytes: int) -> None:
    """Let the float forms of packed weights take at most ``nbytes`` (0: keep none); drop them all.

    Raises InvalidArgumentError on a negative number.
    """
    if nbytes < 0:
        refuse("set_weight_cache_limit", "nbytes", nbytes, "0 or more")
    weight_cache.clear()
    weight_cache.limit = nbytes


def _versions(*tensors: torch.Tensor) -> Versions | None:
    if any(tensor.is_inference() for tensor in tensors):
        return None
    packed, scales, zeros = tensors
    return packed._version, scales._version, zeros._version


def _same(kept: torch.Tensor, given: torch.Tensor) -> bool:
    return kept is given or (kept.dtype == given.dtype and torch.equal(kept, given))


def _all_nbytes(entry: PreparedWeight) -> int:
    return sum(map(_nbytes, entry.forms.values()))


def _nbytes(form: Form) -> int:
    # An opaque oneDNN tensor has a size but no storage to ask.
    return sum(part.numel() * part.element_size() for part in form)
