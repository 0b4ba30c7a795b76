"""Building a part of a model and filling it with the weights it needs, and no others.

Which tensors of a checkpoint those are, and how they are renamed, merged (fused experts) or dequantised, is
decided by transformers' own rules; what is added here is that only those tensors are read, as unread slices of
memory-mapped safetensors files, so that loading costs little more memory than the weights themselves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, UserInputError
from .architecture import config_for
from .building import BUILDING
from .checkpoint import Checkpoint
from .compat import WeightConverter, WeightRenaming, get_model_conversion_mapping, rename_source_key
from .examine import Architecture, examine
from .pruning import pruned_class, quiet_transformers

_STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def as_dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    """The dtype to load in: the one given, else the one the model was saved in, else float32.

    Raises
    ------
    UserInputError
        For a name torch does not know, or a dtype that is not floating point.
    """
    chosen = dtype if dtype is not None else getattr(config, "dtype", None)
    if isinstance(chosen, str):
        named = getattr(torch, chosen.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise UserInputError(f"{chosen!r} is not a dtype: use float32, bfloat16 or float16")
        chosen = named
    if chosen is None:
        chosen = torch.float32
    if not chosen.is_floating_point:
        raise UserInputError(f"{chosen} is not a floating-point dtype: use float32, bfloat16 or float16")
    return chosen


def wanted_tensors(model: Any, names: Iterable[str], held: re.Pattern[str] | None = None) -> dict[str, bool]:
    """Names of the checkpoint's tensors that this (meta) model needs, and whether each becomes a part of another.

    Parameters
    ----------
    model : PreTrainedModel
        With only the modules that are held.
    names : iterable of str
        All tensor names of the checkpoint.
    held : pattern, optional
        Names to take besides: scales and quantisation states of held layers, which no parameter is named after.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    present = model.state_dict()
    wanted = {}
    for name in names:
        renamed, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, present)
        if renamed in present or name in present or (held is not None and held.search(name)):
            wanted[name] = merged is not None
    return wanted


def load_part(
    cls: type,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    held: re.Pattern[str] | None = None,
    new_weights: bool = False,
) -> Any:
    """Build a model class of which a part was taken out, and load what is left.

    Parameters
    ----------
    cls : type
        From `nbrunner.blocks.pruning`: a transformers class whose instances lack what is not held.
    checkpoint : Checkpoint
        Where the weights are.
    dtype, device
        What to load as, and where to.
    held : pattern, optional
        See `wanted_tensors`.
    new_weights : bool
        Whether weights that the checkpoint lacks may be initialised instead (a new classification head).

    Returns
    -------
    PreTrainedModel
        In evaluation mode.

    Raises
    ------
    CheckpointError
        A tensor that is missing or has a wrong shape.
    """
    with BUILDING:
        return _load_part(cls, checkpoint, dtype=dtype, device=device, held=held, new_weights=new_weights)


def _load_part(
    cls: type,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    held: Any,
    new_weights: bool,
) -> Any:
    with torch.device("meta"):
        empty: Any = cls(config_for(cls, checkpoint.config))
    names = wanted_tensors(empty, checkpoint.weight_map, held)
    placed = {} if torch.device(device).type == "cpu" else {"device_map": {"": str(device)}}
    as_they_are = dtype if not placed else None
    with ExitStack() as stack, quiet_transformers(), _one_tensor_at_a_time():
        slices = _slices(checkpoint, names, as_they_are, stack)
        try:
            model, report = cls.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config_for(cls, checkpoint.config),
                state_dict=slices,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **placed,
            )
        except SafetensorError as error:
            raise CheckpointError(
                f"the weights of {checkpoint.name} are damaged ({error}): fetch them again.", model=checkpoint.name
            ) from error
    _check_report(checkpoint, report, new_weights=new_weights)
    return model.eval()


class _Passing:
    """A tensor that will be converted, merged or moved, and so is only needed for a moment.

    It is read through a mapping of the file of its own, which goes with it. Through the shared one, every page that
    was read would stay resident until the whole span is loaded: float32 weights loaded as bfloat16 then peak at
    three times what they end up as (measured: 569 MB for 189 MB; 205 MB this way).
    """

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        with safe_open(self._file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_slice(self._name)[index]
            return tensor


@contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """Without transformers' reader threads, which run ahead and hold every tensor before the first is merged."""
    switch = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(switch, None)
        else:
            os.environ[switch] = before


def _slices(
    checkpoint: Checkpoint, names: dict[str, bool], as_they_are: torch.dtype | None, stack: ExitStack
) -> dict[str, Any]:
    """The tensors, unread. Those that stay as they are, in this dtype, share one mapping with the page cache."""
    slices: dict[str, Any] = {}
    for file, members in checkpoint.fetch(names).items():
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            for name in members:
                shared = opened.get_slice(name)
                stays = as_they_are and not names[name] and shared.get_dtype() == _STORED_AS.get(as_they_are)
                slices[name] = shared if stays else _Passing(file, name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name} of {checkpoint.name} cannot be read as safetensors ({error}): fetch it again.",
                model=checkpoint.name,
            ) from error
    return {name: slices[name] for name in names}


def _check_report(checkpoint: Checkpoint, report: dict[str, Any], *, new_weights: bool) -> None:
    missing = sorted(map(str, report.get("missing_keys", ())))
    wrong = sorted(map(str, report.get("mismatched_keys", ())))
    problems = [("lacks", missing)] if missing and not new_weights else []
    problems += [("has the wrong shape for", wrong)] if wrong else []
    for what, names in problems:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise CheckpointError(
            f"{checkpoint.name} {what} {shown}: its weights do not fit its config.json. "
            "Use a checkpoint that save_pretrained() wrote whole.",
            model=checkpoint.name,
        )


def load_span_model(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    change: Callable[[Any], None] | None = None,
) -> tuple[Any, Architecture]:
    """Load the blocks ``[start, end)`` with what runs before them, and nothing else.

    ``change`` may change the model once it is built and before it takes its weights: what it then has no parameter
    for is not read.

    Raises
    ------
    UnsupportedModelError
        Before anything is read.
    UserInputError
        For a range that is empty or not inside the model.
    CheckpointError
        For weights that are missing.
    """
    architecture = examine(checkpoint.config)
    if not 0 <= start < end <= architecture.num_blocks:
        raise UserInputError(
            f"blocks {start}:{end} are not a range inside {checkpoint.name}, "
            f"which has blocks 0:{architecture.num_blocks}"
        )
    cls = pruned_class(architecture.model_class, start, end, architecture.outside, change)
    held = None
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        numbers = "|".join(map(str, range(start, end)))
        held = re.compile(rf"(^|\.){re.escape(architecture.layers_path.rpartition('.')[2])}\.({numbers})\.")
    model = load_part(cls, checkpoint, dtype=as_dtype(dtype, checkpoint.config), device=device, held=held)
    return model, architecture
