"""Adapters that servers serve by name: those they were started with, and those that clients offer."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch
from client_models import GREEDY, left_padded, prompt, save_plain, without_end
from helpers import wait_until
from inprocess_swarm import ROOMY, InProcessSwarm
from parity.chain import local_model
from test_peft_local import config, fill
from transformers import AutoModelForCausalLM

import nbrunner
from nbrunner.blocks.adapters_wire import manifest_of
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.lora import learned_in
from nbrunner.blocks.peft_files import find_adapter, load_peft_adapter
from nbrunner.client import connection
from nbrunner.errors import BadPeerDataError, MissingBlocksError, PeerRefusedError, UserInputError
from nbrunner.protocol.adapters import AdapterManifest, AdapterOffered, OfferAdapter
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.manifests import encode_manifest, open_manifest, sign_manifest, uid_of
from nbrunner.server.options import parse_adapter
from nbrunner.swarm.loop import EngineLoop

IDS, MASK = prompt(3, 12), left_padded(3, 12)
PADDED: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_plain("llama", folder)
    return folder


def plain_model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    without_end(model)
    return model


def save_adapter(folder: Path, into: Path, seed: int, **options: Any) -> Path:
    model = peft.get_peft_model(plain_model(folder), config(**options))
    fill(model, seed)
    model.save_pretrained(into)
    return into


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "poems": save_adapter(folder, root / "poems", 1),
        "facts": save_adapter(
            folder, root / "facts", 2, r=2, target_modules=["q_proj", "down_proj"], use_rslora=True
        ),
    }


def with_peft(folder: Path, saved: Path) -> Any:
    return peft.PeftModel.from_pretrained(plain_model(folder), saved).eval()


# -- files ---------------------------------------------------------------------------------------------------------


def test_read_as_peft_reads_it(folder: Path, saved: dict[str, Path]) -> None:
    checkpoint = resolve_checkpoint(folder)
    for one in saved.values():
        ours = peft.PeftModel.from_pretrained(local_model(checkpoint, 2), one)
        learned = learned_in(ours.base_model.model.nbrunner_skeleton.layers)
        found = load_peft_adapter(checkpoint, find_adapter(str(one)))
        assert {block: part.digest for block, part in found.items()} == {
            block: part.digest for block, part in learned.adapter.blocks.items()
        }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "outside the blocks"),
        ({"use_dora": True}, "(?i)dora"),
        ({"modules_to_save": ["lm_head"]}, "outside the blocks"),
    ],
)
def test_adapters_that_servers_cannot_serve(
    folder: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    one = save_adapter(folder, tmp_path / "one", 3, **options)
    with pytest.raises(UserInputError, match=said):
        load_peft_adapter(resolve_checkpoint(folder), one)


def test_folders_that_are_no_adapters(folder: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(folder)
    with pytest.raises(UserInputError, match=r"no adapter_config\.json"):
        find_adapter(str(tmp_path))
    pickled = tmp_path / "pickled"
    shutil.copytree(saved["poems"], pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(UserInputError, match="can run code"):
        find_adapter(str(pickled))
    other = tmp_path / "other"
    shutil.copytree(saved["poems"], other)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(UserInputError, match="IA3"):
        load_peft_adapter(checkpoint, other)
    (other / "adapter_config.json").write_text(json.dumps({**settings, "r": 7}))
    with pytest.raises(UserInputError, match="PEFT cannot put"):
        load_peft_adapter(checkpoint, other)
    (other / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"]}))
    with pytest.raises(UserInputError, match="only one of the two"):
        load_peft_adapter(checkpoint, other)
    with pytest.raises(UserInputError, match="here or on the hub"):
        find_adapter(str(tmp_path / "nothing" / "here" / "at all"))


def test_what_the_command_line_says() -> None:
    assert parse_adapter("poems=./a=b") == ("poems", "./a=b")
    for text in ("poems", "=x", "a b=x", "poems=", "../x=y", "-x=y"):
        with pytest.raises(UserInputError, match="does not say which adapter"):
            parse_adapter(text)


# -- manifests -----------------------------------------------------------------------------------------------------


def test_manifests_are_signed_by_their_author() -> None:
    author, other = Identity.generate(), Identity.generate()
    manifest = AdapterManifest("poems", "m", [b"", bytes(32)], 4, ["q_proj"], author.peer_id)
    data = encode_manifest(manifest)
    signature = sign_manifest(data, b"swarm", author)
    assert open_manifest(data, signature, b"swarm") == (uid_of(data, "poems"), manifest)
    for bad in (sign_manifest(data, b"swarm", other), sign_manifest(data, b"other", author), b"", bytes(64)):
        with pytest.raises(BadPeerDataError, match="not signed"):
            open_manifest(data, bad, b"swarm")
    changed = encode_manifest(msgspec.structs.replace(manifest, rank=5))
    with pytest.raises(BadPeerDataError, match="not signed"):
        open_manifest(changed, signature, b"swarm")
    for broken in (
        msgspec.structs.replace(manifest, blocks=[b""], author=""),
        msgspec.structs.replace(manifest, blocks=[b"short"], author=""),
        msgspec.structs.replace(manifest, author="12D3nobody"),
    ):
        with pytest.raises(BadPeerDataError):
            open_manifest(encode_manifest(broken), b"", b"swarm")
    for name in ("", "a b", "<b>", "x" * 61, "../up"):
        with pytest.raises(BadPeerDataError, match="not the manifest"):
            open_manifest(encode_manifest(msgspec.structs.replace(manifest, name=name)), b"", b"swarm")
    for junk in (b"", b"\xc1", data[:-1], data + b"\0"):
        with pytest.raises(BadPeerDataError):
            open_manifest(junk, b"", b"swarm")


# -- over servers --------------------------------------------------------------------------------------------------


class AdapterSwarm(InProcessSwarm):
    """Whose servers serve adapters."""

    def __init__(self, model: Path, adapters: dict[str, Path], *, accept: bool = False) -> None:
        super().__init__(model)
        self.options = {
            "adapters": [(name, str(path)) for name, path in adapters.items()],
            "accept_adapters": accept,
        }

    def start(self) -> AdapterSwarm:
        self.add(0, 2, **self.options)
        self.add(2, 4, **self.options)
        return self


@pytest.fixture(scope="module")
def swarm(folder: Path, saved: dict[str, Path]) -> Iterator[AdapterSwarm]:
    swarm = AdapterSwarm(folder, saved, accept=True).start()
    yield swarm
    swarm.close()


def client(swarm: InProcessSwarm, folder: Path, budget: float = 4.0, *, somebody_else: bool = False) -> Any:
    """A client's model; all clients of a process are one peer, unless it is to be ``somebody_else``."""
    if somebody_else:
        connection._open.clear()
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(
        folder, invite=swarm.invite, retry_budget=budget
    )
    without_end(model)
    swarm.seen_by(model)
    return model


@pytest.fixture
def model(swarm: AdapterSwarm, folder: Path) -> Iterator[Any]:
    model = client(swarm, folder)
    yield model
    model.close()


@pytest.mark.network
def test_servers_of_the_same_files_announce_the_same(model: Any) -> None:
    found = {one.name: one for one in model.adapters}
    assert set(found) >= {"poems", "facts"}
    for name in ("poems", "facts"):
        assert len(found[name].peers) == 2
        assert found[name].blocks == [(0, 4)]
        assert found[name].uid.startswith(f"{name}@")


@pytest.mark.network
def test_equal_to_peft_alone(model: Any, folder: Path, saved: dict[str, Path]) -> None:
    for name in ("poems", "facts"):
        plain = with_peft(folder, saved[name])
        with torch.no_grad():
            expected = plain(**PADDED, use_cache=False).logits
            assert torch.equal(
                model(**PADDED, use_cache=False, adapter=name).logits[MASK.bool()], expected[MASK.bool()]
            )
        assert torch.equal(model.generate(**PADDED, adapter=name, **GREEDY), plain.generate(**PADDED, **GREEDY))
    assert torch.equal(model.generate(**PADDED, **GREEDY), plain_model(folder).generate(**PADDED, **GREEDY))
    assert model.runner.adapters.bytes_sent == 0


@pytest.mark.network
def test_several_and_none_at_the_same_time(
    model: Any, swarm: AdapterSwarm, folder: Path, saved: dict[str, Path]
) -> None:
    names = ["poems", None, "facts", "poems", None, "facts"]
    expected = {
        name: (plain_model(folder) if name is None else with_peft(folder, saved[name])).generate(**PADDED, **GREEDY)
        for name in set(names)
    }
    found: dict[int, Any] = {}

    def generate(index: int, name: str | None) -> None:
        found[index] = model.generate(**PADDED, adapter=name, **GREEDY)

    threads = [threading.Thread(target=generate, args=one) for one in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, name in enumerate(names):
        assert torch.equal(found[index], expected[name])


@pytest.mark.network
def test_sessions_paths_gradients(model: Any, folder: Path, saved: dict[str, Path]) -> None:
    plain = with_peft(folder, saved["poems"])
    ids = IDS[1:2]
    with model.inference_session(adapter="poems") as session:
        parts = [model.generate(ids, max_new_tokens=3, do_sample=False, session=session)]
        parts.append(model.generate(None, max_new_tokens=3, do_sample=False, session=session))
        assert torch.equal(torch.cat(parts, 1), plain.generate(ids, max_new_tokens=6, do_sample=False))
        with pytest.raises(UserInputError, match="given when it begins"):
            model.generate(None, max_new_tokens=1, session=session, adapter="poems")
    path = model.path(range(4))
    assert torch.equal(path.generate(ids, adapter="poems", **GREEDY), plain.generate(ids, **GREEDY))
    grads = []
    for one, options in ((model, {"adapter": "poems"}), (plain, {})):
        embeds = plain.get_input_embeddings()(ids).detach().requires_grad_(True)
        one(inputs_embeds=embeds, use_cache=False, **options).logits.pow(2).mean().backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.network
def test_names_that_nobody_serves(model: Any) -> None:
    with pytest.raises(UserInputError, match=r"nobody serves an adapter 'songs'.*facts@"):
        model.generate(**PADDED, adapter="songs", **GREEDY)
    with pytest.raises(UserInputError, match="nobody serves"):
        model(IDS, adapter="songs@0123456789abcdef")


@pytest.mark.network
@pytest.mark.allow_leaks("puts another server into the module's swarm, which ends it")
def test_only_servers_that_have_it_are_used(swarm: AdapterSwarm, folder: Path, saved: dict[str, Path]) -> None:
    bare = swarm.add(2, 4)
    model = client(swarm, folder)
    try:
        for _ in range(4):
            with model.inference_session(adapter="poems") as session:
                model.generate(IDS[1:2], max_new_tokens=1, do_sample=False, session=session)
                assert bare.node.peer_id not in {peer for peer, *_ in session.chain}
        (server,) = swarm.servers[1:2]
        swarm.remove(server)
        swarm.seen_by(model)
        with pytest.raises(MissingBlocksError, match="does not serve the adapter poems@") as caught:
            model(IDS, use_cache=False, adapter="poems")
        assert caught.value.blocks == [(2, 4)]
        replaced = swarm.add(2, 4, **swarm.options)
        swarm.seen_by(model)
        plain = with_peft(folder, saved["poems"])
        assert torch.equal(model.generate(**PADDED, adapter="poems", **GREEDY), plain.generate(**PADDED, **GREEDY))
        assert replaced.sessions == 0 or wait_until(lambda: replaced.sessions == 0, 10)
    finally:
        model.close()
        swarm.remove(bare)


@pytest.mark.network
def test_an_own_adapter_and_a_named_one(model: Any) -> None:
    ours = peft.get_peft_model(model, config())
    with pytest.raises(UserInputError, match="use one of them"):
        ours(IDS, use_cache=False, adapter="poems")
    with ours.disable_adapter():
        ours.generate(**PADDED, adapter="poems", **GREEDY)


# -- offers --------------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_offered_used_by_others_replaced_and_withdrawn(swarm: AdapterSwarm, folder: Path, tmp_path: Path) -> None:
    teacher, reader = client(swarm, folder), client(swarm, folder, somebody_else=True)
    try:
        with pytest.raises(UserInputError, match="nothing to offer"):
            teacher.offer_adapter("mine")
        ours = peft.get_peft_model(teacher, config()).eval()
        fill(ours, 8)
        ours.save_pretrained(tmp_path / "mine")
        offer = ours.offer_adapter("mine")
        assert (len(offer.accepted), offer.refused, offer.missing) == (2, {}, [])
        assert repr(offer).startswith(f"<Offer {offer.uid}: taken by …")
        plain = with_peft(folder, tmp_path / "mine")
        expected = plain.generate(**PADDED, **GREEDY)
        wait_until(lambda: _served(reader, offer.uid), 30, what="the offer is announced")
        with reader.inference_session(adapter="mine") as session:
            begun = reader.generate(IDS[1:2], max_new_tokens=4, do_sample=False, session=session)
            assert torch.equal(reader.generate(**PADDED, adapter="mine", **GREEDY), expected)
            fill(ours, 9)  # the teacher goes on: what was offered stays what it was
            assert torch.equal(reader.generate(**PADDED, adapter=offer.uid, **GREEDY), expected)
            second = ours.offer_adapter("mine")
            assert second.uid != offer.uid
            assert all(second.uid in server.host.served.uids for server in swarm.servers)
            assert not any(offer.uid in server.host.served.uids for server in swarm.servers)
            # a session that uses the old one goes on with it
            rest = reader.generate(None, max_new_tokens=4, do_sample=False, session=session)
            whole = plain.generate(IDS[1:2], max_new_tokens=8, do_sample=False)
            assert torch.equal(torch.cat([begun, rest], 1), whole)
        wait_until(lambda: _served(teacher, second.uid), 30, what="the second offer is announced")
        wait_until(lambda: _served(reader, second.uid), 30, what="the reader sees it too")
        assert reader.withdraw_adapter(second.uid) == []  # not its author
        assert len(ours.withdraw_adapter(second.uid)) == 2
        assert not any("mine" in uid for server in swarm.servers for uid in server.host.served.uids)
        with pytest.raises(UserInputError, match="cannot name an adapter"):
            ours.offer_adapter("a b")
    finally:
        teacher.close()
        reader.close()


def _served(model: Any, uid: str) -> bool:
    EngineLoop.get().run(model.swarm.directory.refresh(), timeout=10)
    return any(one.uid == uid and one.blocks == [(0, 4)] for one in model.adapters)


@pytest.mark.network
def test_two_of_the_same_name(swarm: AdapterSwarm, folder: Path) -> None:
    one, other = client(swarm, folder), client(swarm, folder, somebody_else=True)
    uids = []
    try:
        for seed, model in enumerate((one, other)):
            ours = peft.get_peft_model(model, config())
            fill(ours, seed)
            uids.append(ours.offer_adapter("same").uid)
        wait_until(lambda: all(_served(one, uid) for uid in uids), 30, what="both are announced")
        reader = client(swarm, folder)
        try:
            with pytest.raises(UserInputError, match="several adapters are called 'same'"):
                reader.generate(**PADDED, adapter="same", **GREEDY)
            reader.generate(**PADDED, adapter=uids[0], **GREEDY)
        finally:
            reader.close()
    finally:
        for model, uid in zip((one, other), uids, strict=False):
            model.withdraw_adapter(uid)
            model.close()


@pytest.mark.network
def test_offers_that_are_refused(swarm: AdapterSwarm, folder: Path) -> None:
    """Where nobody accepts them; somebody else's; for another model; of blocks that are not there; too many."""
    model = client(swarm, folder)
    server = swarm.servers[0]
    peer, node = server.node.peer_id, model.swarm.node
    ours = peft.get_peft_model(model, config())
    fill(ours, 4)
    blocks = learned_in(model.nbrunner_skeleton.layers).adapter.blocks
    streams = model.runner._requests.streams

    def ask(manifest: AdapterManifest, signer: Identity = node.identity) -> Any:
        data = encode_manifest(manifest)
        request = OfferAdapter(data, sign_manifest(data, node.swarm, signer))
        return EngineLoop.get().run(streams.ask(peer, request, (), AdapterOffered))

    good = manifest_of("mine", server.host.model, 4, blocks, node.peer_id)
    try:
        with pytest.raises(PeerRefusedError, match="not here; send them first") as caught:
            ask(good)
        assert caught.value.code == "adapter"
        stranger = Identity.generate()
        cases = [
            (msgspec.structs.replace(good, author=stranger.peer_id), stranger, "offered by its author"),
            (msgspec.structs.replace(good, author=""), node.identity, "offered by its author"),
            (good, stranger, "not signed"),
            (msgspec.structs.replace(good, model="other@1"), node.identity, "is for other@1"),
            (msgspec.structs.replace(good, blocks=good.blocks[:3]), node.identity, "is for"),
        ]
        for manifest, signer, said in cases:
            with pytest.raises(PeerRefusedError, match=said):
                ask(manifest, signer)
        for name in "abcd":
            assert peer in ours.offer_adapter(name).accepted
        fifth = ours.offer_adapter("e")
        assert not fifth.accepted
        assert "4 of them yours" in fifth.refused[peer]
        assert fifth.missing == [(0, 4)]
        server.host.served._accept = False
        assert "takes no offers" in ours.offer_adapter("a2").refused[peer]
    finally:
        server.host.served._accept = True
        for one in swarm.servers:
            for uid, held in list(one.host.served._served.items()):
                if held.author:
                    one.host.served.withdraw(held.author, uid)
        model.close()
    with pytest.raises(PeerRefusedError):
        server.host.served.withdraw(stranger.peer_id, good.name)


@pytest.mark.network
def test_a_server_that_lies_about_an_adapter(swarm: AdapterSwarm, folder: Path, monkeypatch: Any) -> None:
    model = client(swarm, folder)
    (poems,) = [one for one in model.adapters if one.name == "poems"]
    (facts,) = [one for one in model.adapters if one.name == "facts"]
    liar, honest = swarm.servers[0], swarm.servers[1]
    wrong = liar.host.served.info(facts.uid)
    info = liar.host.served.info
    monkeypatch.setattr(liar.host.served, "info", lambda uid: wrong if uid == poems.uid else info(uid))
    try:
        found = model.runner.find_adapter("poems")
        assert found.adapter.uid == poems.uid
        assert set(model.swarm.directory.view.failed) <= {liar.node.peer_id}
        monkeypatch.setattr(honest.host.served, "info", lambda uid: wrong)
        model.runner._named._known.clear()
        with pytest.raises(nbrunner.SwarmError, match="another adapter than the one it announced"):
            EngineLoop.get().run(model.runner._named._ask(poems))
    finally:
        model.close()


@pytest.mark.network
def test_from_the_command_line(folder: Path, saved: dict[str, Path]) -> None:
    with nbrunner.LocalSwarm(folder, servers=2, adapters=saved, accept_adapters=True) as local:
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(folder, invite=local.invite)
        without_end(model)
        plain = with_peft(folder, saved["facts"])
        assert torch.equal(model.generate(**PADDED, adapter="facts", **GREEDY), plain.generate(**PADDED, **GREEDY))
        model.close()
    with pytest.raises(nbrunner.NBRunnerError, match="no adapter_config"):
        nbrunner.LocalSwarm(folder, servers=1, adapters={"x": folder.parent})


@pytest.mark.network
def test_a_rank_over_the_servers_limit(folder: Path, saved: dict[str, Path]) -> None:
    swarm = AdapterSwarm(folder, saved)
    with pytest.raises(UserInputError, match=r"adapter poems.*rank 4"):
        swarm.add(0, 2, limits=msgspec.structs.replace(ROOMY, adapter_rank=3), **swarm.options)
    swarm.close()
