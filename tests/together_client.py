"""A client process that teaches the bundled model its part of some facts, alone or together; run by tests.

``python together_client.py``: options as JSON on the first line of standard input. Prints JSON lines. Once it has
joined the others it waits for a second line.
"""

from __future__ import annotations

import json
import sys
import time

import torch

RIVERS = ["Ombra", "Telda", "Quorn", "Vesk", "Lurin", "Damma", "Isk", "Porra", "Sel"]
LAKES = ["Mirra", "Ahun", "Bodo", "Cael", "Dorn", "Esk", "Fenn", "Gola", "Hald"]
FACTS = [f"The river {river} flows into the lake {lake}." for river, lake in zip(RIVERS, LAKES, strict=True)]


def say(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def main() -> None:
    options = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    torch.manual_seed(options["seed"])
    import peft
    import transformers

    import nbrunner
    from nbrunner.tuning.together import Together

    tokenizer = transformers.AutoTokenizer.from_pretrained(options["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(options["model"], invite=options["invite"])
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    model = peft.get_peft_model(base, config)

    def batch(texts: list[str]) -> dict[str, torch.Tensor]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels}

    mine = batch(FACTS[options["part"] :: options["parts"]])
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.02)
    together = None
    if options.get("name"):
        together = Together(
            options["invite"],
            options["name"],
            model,
            every_steps=options["every"],
            method="prompt",
            member=f"part {options['part']}",
            patience=10.0,
        ).start()
        say("joined", peer=together.peer_id, child=together._process.pid, round=together.round)
        sys.stdin.readline()
    waited: list[float] = []
    for step in range(options["steps"]):
        loss = model(**mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        outcome = together.after_step(len(mine["input_ids"])) if together is not None else None
        if outcome is not None:
            waited.append(outcome.seconds)
        peers = len(outcome.peers) if outcome is not None else 0
        say("step", step=step, loss=loss.item(), kind=outcome and outcome.kind, peers=peers)
        if options.get("pace"):
            time.sleep(options["pace"])
    kinds: dict[str, int] = {}
    if together is not None:
        last = together.finish()
        for one in together.history:
            kinds[one.kind] = kinds.get(one.kind, 0) + 1
        say("met", kind=last.kind, last=last.last, peers=len(last.peers))
    with torch.no_grad():
        loss = model(**batch(FACTS)).loss.item()
    vector = torch.cat([one.detach().reshape(-1) for one in model.parameters() if one.requires_grad])
    torch.save(vector, options["save"])
    participants = [
        {"peer": one.peer, "state": one.state, "steps": one.steps, "rounds": one.rounds}
        for one in (together.participants() if together is not None else [])
    ]
    say("done", loss=loss, waited=max(waited, default=0.0), kinds=kinds, participants=participants)
    if together is not None:
        together.close()


if __name__ == "__main__":
    main()
