"""Every decoder-only family of transformers, split in two, against the plain model: `python -m tests.parity`."""
