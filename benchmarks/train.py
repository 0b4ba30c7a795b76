"""One optimiser step of prompt tuning and of LoRA against the same PEFT method on the whole local model."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.models import checkpoint, local_model, remote_model
from benchmarks.report import Report, Result, interleaved

ROWS, TOKENS = 4, 64
ROUNDS = 9
METHODS = ("prompt tuning", "LoRA r 8")


def run() -> Report:
    """``mid``, 4 × 64 tokens: forward, loss, backward and AdamW; one thread for each process."""
    import nbrunner

    results: list[Result] = []
    traffic: dict[str, object] = {}
    locals_ = {method: _Learner(local_model("mid"), method) for method in METHODS}
    folder = str(checkpoint("mid"))
    with (
        nbrunner.LocalSwarm(model=folder, servers=1) as one,
        nbrunner.LocalSwarm(model=folder, servers=2) as two,
        nbrunner.LocalSwarm(model=folder, servers=["0:16", "0:16"]) as both,
    ):
        for method in METHODS:
            learners = [_Learner(remote_model("mid", swarm.invite), method) for swarm in (one, two, both)]
            seconds = interleaved([*(learner.step for learner in learners), locals_[method].step], ROUNDS)
            ours, halves, wholes, theirs = (ROWS * TOKENS / one for one in seconds)
            results += [
                Result(f"{method}, 1 server, of local", ours, "tokens/s", theirs, ours / theirs, 0.8),
                Result(
                    f"{method}, 2 servers of 8 blocks, of 1 server", halves, "tokens/s", ours, halves / ours, 1.3
                ),
                Result(
                    f"{method}, 2 servers of 16 blocks, of 1 server", wholes, "tokens/s", ours, wholes / ours, 1.3
                ),
            ]
            for name, learner in zip(("1 server", "2 of 8 blocks", "2 of 16 blocks"), learners, strict=True):
                traffic[f"{method}, {name}"] = learner.bytes_of_a_step()
                learner.close()
    conditions = {"batch": ROWS, "tokens": TOKENS, "dtype": "float32", "threads": 1, "bytes a step": traffic}
    return Report("train", results, conditions)


class _Learner:
    """A model, a PEFT method around it, and an optimiser."""

    def __init__(self, model: Any, method: str) -> None:
        import peft
        import torch

        self._base = model
        torch.manual_seed(1)
        config = (
            peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
            if method.startswith("LoRA")
            else peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
        )
        self._model = peft.get_peft_model(model, config).train()
        learned = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(learned, lr=1e-3)
        self._ids = torch.randint(3, 32000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
        self.loss = 0.0

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self._optimizer.zero_grad()
        loss = self._model(input_ids=self._ids, labels=self._ids, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self.loss = loss.item()
        return time.perf_counter() - began

    def bytes_of_a_step(self) -> dict[str, int]:
        """Of tensors: hidden states and their gradients both ways, adapters there and their gradients back."""
        from nbrunner.client.watch import PassWatch, watching

        watch, adapters = PassWatch(), self._adapter_bytes()
        with watching(watch):
            self.step()
        sent_adapters = self._adapter_bytes() - adapters
        wire = sum(one.bytes_sent + one.bytes_received for one in watch.passes)
        # with one server they come with those of the hidden states; with several they are fetched once, as a sum
        grads = sum(one.bytes_received - one.bytes_sent for one in watch.passes if one.backward)
        return {"states": wire - grads, "adapter": sent_adapters, "adapter gradients": max(grads, sent_adapters)}

    def _adapter_bytes(self) -> int:
        return int(self._base.runner.adapters.bytes_sent)

    def close(self) -> None:
        self._base.close()
