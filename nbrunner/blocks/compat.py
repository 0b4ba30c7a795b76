"""Every semi-private name of transformers that nbrunner uses, and nothing else imports one.

transformers promises its public classes (``AutoConfig``, ``PreTrainedModel.from_pretrained``, ``DynamicCache``,
the ``MODEL_*_MAPPING`` tables). Reading only a part of a checkpoint and keeping only a part of the caches needs a
little more than that, and these names may move in any minor release:

- `rename_source_key`, `WeightRenaming`, `WeightConverter`, `get_model_conversion_mapping`: the rules by which
  transformers renames and merges the tensors of a checkpoint. Choosing a span's tensors with any other rules would
  be a second, slowly diverging copy of them.
- the classes of one layer's cache: a span keeps caches under absolute layer numbers with an empty placeholder
  (`DummyLayer`) for each layer it does not hold, and replaces the layer that copies its whole content in each step.
- `AttentionInterface`, `AttentionMaskInterface` and the tables they fill: attention of several sessions at once.
- `Conv1D`: the linear layer of the GPT-2 family, with its weight the other way round.
- `printer_callback`: what a Trainer prints with unless it is taken away.

A release of transformers that moves one of them fails here, at import, and the parity tests say what changed;
`pyproject.toml` allows the releases whose two ends pass them.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # before 5.23, where an empty recurrent layer is what masks and lengths pass over
    from transformers.cache_utils import LinearAttentionLayer

    class DummyLayer(LinearAttentionLayer):  # type: ignore[misc, no-redef]
        """The place of a layer that keeps no cache."""

        is_croppable = True
        keys = values = None

        def update(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError("a layer that is not held was run")

        def crop(self, tokens_to_remove: int) -> None:
            """There is nothing to crop."""


def printer_callback() -> type:
    """Imported when it is asked for: it takes a second, and only training needs it."""
    from transformers.trainer_callback import PrinterCallback

    found: type = PrinterCallback
    return found


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "Conv1D",
    "DummyLayer",
    "DynamicLayer",
    "LinearAttentionCacheLayerMixin",
    "WeightConverter",
    "WeightRenaming",
    "get_model_conversion_mapping",
    "printer_callback",
    "rename_source_key",
]
