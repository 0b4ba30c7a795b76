"""The tokenizer that belongs to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbrunner.errors import CheckpointError


def load_tokenizer(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Any:
    """The tokenizer in a model's directory or repository.

    Parameters
    ----------
    source
        Directory or hub id.
    revision, token
        Of a hub repository, as in transformers.

    Raises
    ------
    CheckpointError
        There is none, or it needs code from the checkpoint, which is never run.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {} if Path(source).is_dir() else {"revision": revision or "main", "token": token}
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # of ten kinds, from OSError to KeyError: each family reads its own files
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"no tokenizer could be loaded for {source} ({why}): a text needs one. Put the model's tokenizer files "
            "beside its weights (tokenizer.save_pretrained writes them), or use token ids in Python.",
            model=str(source),
        ) from error
