"""The model directory: round trips, the published file names, and what is refused."""

import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from storage.pretrained import (
    WEIGHTS_NAMES,
    PretrainedModel,
    find_model,
    model_fingerprint,
    read_weights,
)


@dataclass
class ToyConfig:
    width: int = 4
    levels: tuple[int, ...] = (1, 2)


class Toy(PretrainedModel):
    """With parameters, a buffer of numbers and one of integers."""

    config_class = ToyConfig
    class_name = "Toy_v2"

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        self.linear = nn.Linear(self.config.width, 2)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        self.register_buffer("mean", torch.zeros(2).add_(1))
        self.register_buffer("count", torch.tensor(5))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Toy(width=3)
    model.mean.fill_(7.0)
    model.save_pretrained(tmp_path / "toy")
    return model, tmp_path / "toy"


def assert_same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_round_trip(saved):
    model, path = saved
    loaded = Toy.from_pretrained(path)
    assert not loaded.training and loaded.config == ToyConfig(3, (1, 2))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_weights(loaded, model)
    assert model_fingerprint(loaded) == model_fingerprint(model)
    config = json.loads((path / "config.json").read_text())
    assert config == {"_class_name": "Toy_v2", "_version": "0.0.1", "levels": [1, 2], "width": 3}


class Waves(Toy):
    """And with a buffer that no file holds."""

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        self.register_buffer("frequencies", torch.arange(3.0), persistent=False)


def test_loading_draws_no_random_values_and_computes_what_no_file_holds(saved):
    model, path = saved
    before = torch.get_rng_state()
    Toy.from_pretrained(path)
    assert torch.equal(torch.get_rng_state(), before)
    loaded = Waves.from_pretrained(path)
    assert_same_weights(loaded, model)
    assert loaded.frequencies.tolist() == [0.0, 1.0, 2.0]
    assert Waves.from_pretrained(path, dtype=torch.bfloat16).frequencies.dtype == torch.bfloat16


def test_fingerprint_sees_one_bit_and_the_config(saved):
    model, _ = saved
    before = model_fingerprint(model)
    with torch.no_grad():
        model.linear.bias[0] += 1e-7
    assert model_fingerprint(model) != before
    assert model_fingerprint(Toy(width=3)) != before


def test_a_loaded_model_can_be_trained_and_saved_over_its_own_file(saved):
    """The weights are mapped from the file: neither may disturb the other."""
    model, path = saved
    loaded = Toy.from_pretrained(path)
    with torch.no_grad():
        loaded.linear.weight += 1
    assert torch.equal(load_file(path / "model.safetensors")["linear.weight"], model.linear.weight)
    loaded.save_pretrained(path)
    again = Toy.from_pretrained(path)
    loaded.save_pretrained(path, safe_serialization=False)
    for other in (again, Toy.from_pretrained(path)):
        assert torch.equal(other.linear.weight, model.linear.weight + 1)


@pytest.mark.parametrize(
    "extra",
    [
        {"decay": 0.9999, "min_decay": 0.0, "optimization_step": 5, "update_after_step": 0,
         "use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3},
        {"_name_or_path": "openMUSE/toy", "_version": "0.0.1"},
        {"use_position_embeddings": False, "patch_size": 1, "layer_norm_before_mlp": True},
    ],
    ids=["ema", "saved again", "first version"],
)  # fmt: skip
def test_further_keys_of_a_published_config(saved, extra):
    model, path = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | extra))
    assert_same_weights(Toy.from_pretrained(path), model)


def rename_weights(path, name):
    (path / "model.safetensors").rename(path / name)


def split_weights(path, name):
    """In two files and an index, as transformers and diffusers write large models."""
    state = load_file(path / "model.safetensors")
    stem = name.removesuffix(".safetensors.index.json")
    files = [f"{stem}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    where = {key: files[index % 2] for index, key in enumerate(sorted(state))}
    for file in files:
        save_file({key: state[key] for key in state if where[key] == file}, path / file)
    (path / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "model.safetensors").unlink()


def pickle_weights(path, name):
    torch.save(load_file(path / "model.safetensors"), path / name)
    (path / "model.safetensors").unlink()


def disguise_weights(path, name):
    """The weights under one of WEIGHTS_NAMES in place of model.safetensors."""
    if name.endswith(".bin"):
        pickle_weights(path, name)
    elif name.endswith(".json"):
        split_weights(path, name)
    else:
        rename_weights(path, name)


@pytest.mark.parametrize("name", WEIGHTS_NAMES)
def test_every_file_name(saved, name):
    model, path = saved
    disguise_weights(path, name)
    assert_same_weights(Toy.from_pretrained(path), model)
    model.linear.weight.data += 1
    model.save_pretrained(path)  # and the older weights are not read in its place
    assert_same_weights(Toy.from_pretrained(path), model)


def test_half_precision_on_disk_and_in_memory(saved):
    model, path = saved
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(state, path / "model.safetensors")
    loaded = Toy.from_pretrained(path)
    assert loaded.linear.weight.dtype == torch.float32 and loaded.count.dtype == torch.int64
    assert torch.equal(loaded.linear.weight, state["linear.weight"].float())
    narrow = Toy.from_pretrained(path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in narrow.parameters()} == {torch.bfloat16}
    assert narrow.mean.dtype == torch.bfloat16 and narrow.count.dtype == torch.int64
    assert torch.equal(narrow.linear.weight, state["linear.weight"].bfloat16())


def test_saved_as_the_original_saves(saved):
    """open-muse reads pytorch_model.bin by torch.load and hands it to load_state_dict."""
    model, path = saved
    model.save_pretrained(path, safe_serialization=False)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "pytorch_model.bin"]
    state = torch.load(path / "pytorch_model.bin", map_location="cpu")
    assert Toy(width=3).load_state_dict(state) and torch.equal(state["mean"], model.mean)
    legacy = path / "pytorch_model.bin"
    torch.save(model.state_dict(), legacy, _use_new_zipfile_serialization=False)  # before 1.6
    assert_same_weights(Toy.from_pretrained(path), model)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "code in a checkpoint ran")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_never_runs(saved, zipped):
    model, path = saved
    (path / "model.safetensors").unlink()
    mark = path.parent / "mark"
    evil = model.state_dict() | {"linear.weight": Evil(mark)}
    torch.save(evil, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds code \(.*\) beside the weights. Nothing of it"):
        Toy.from_pretrained(path)
    assert not mark.exists()
    torch.load(path / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # the file did hold code


def test_what_is_no_state_dict(saved):
    model, path = saved
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        read_weights(path)
    (path / "model.safetensors").unlink()
    legacy = path / "pytorch_model.bin"
    for content in ({"epoch": 3, "model": model.state_dict()}, torch.zeros(3)):
        torch.save(content, legacy)
        with pytest.raises(ValueError, match="no flat dictionary of tensors.*(epoch|Tensor)"):
            read_weights(path)
    legacy.write_bytes(legacy.read_bytes()[:-100])
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged"):
        read_weights(path)
    legacy.unlink()
    with pytest.raises(FileNotFoundError, match="no weights; looked for model.safetensors"):
        read_weights(path)


def test_strict_loading_lists_every_key(saved):
    model, path = saved
    state = {"linear.weight": torch.zeros(2, 9), "linear.extra": torch.zeros(1)}
    save_file(state, path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Toy.from_pretrained(path)
    text = str(error.value)
    assert "missing linear.bias" in text and "unknown linear.extra" in text
    assert "linear.weight has shape (2, 9), the model (2, 3)" in text
    assert "(a Toy_v2) does not fit Toy" in text


def test_unknown_keyword_and_unknown_place(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="widht.*width"):
        Toy(widht=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        Toy.from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        Toy.from_pretrained(str(tmp_path / "not" / "here" / "at" / "all"))


class Hub(BaseHTTPRequestHandler):
    """The hub's answers that a download needs: what a repository holds, and its files."""

    folder: Path
    commit = "c" * 40
    fetched: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        files = {str(f.relative_to(self.folder)): f for f in self.folder.rglob("*") if f.is_file()}
        name = self.path.split("/", 5)[-1]  # /openMUSE/toy/resolve/COMMIT/NAME
        if "/tree/" in self.path:
            tree = [
                {"type": "file", "path": path, "oid": path, "size": file.stat().st_size}
                for path, file in files.items()
            ]
            content = json.dumps(tree).encode()
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": path} for path in files]
            answer = {"id": "openMUSE/toy", "sha": self.commit, "siblings": siblings}
            content = json.dumps(answer).encode()
        elif name in files:
            content = files[name].read_bytes()
            self.fetched += [name] * body
        else:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty repository openMUSE/toy on a hub of this machine: its folder and what is fetched."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.folder, Hub.fetched = tmp_path / "repo", []
    Hub.folder.mkdir()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", WEIGHTS_NAMES)
@pytest.mark.parametrize("subfolder", [None, "transformer"])
def test_a_download_takes_what_is_read_and_no_more(saved, hub, monkeypatch, name, subfolder):
    model, path = saved
    disguise_weights(path, name)
    (path / "flax_model.msgpack").write_text("large")
    if name != "pytorch_model.bin":
        torch.save({}, path / "pytorch_model.bin")
    path.rename(hub.folder / (subfolder or "") if subfolder else hub.folder)
    assert_same_weights(Toy.from_pretrained("openMUSE/toy", subfolder), model)
    extra = {"flax_model.msgpack", "pytorch_model.bin"} - {name}
    assert not extra & {Path(file).name for file in hub.fetched}
    fetched = len(hub.fetched)
    assert_same_weights(Toy.from_pretrained("openMUSE/toy", subfolder, hub.commit), model)
    assert len(hub.fetched) == fetched  # from the cache
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same_weights(Toy.from_pretrained("openMUSE/toy", subfolder), model)
    assert find_model("openMUSE/toy", subfolder).is_relative_to(path.parent / "cache")


def test_subfolder_of_a_folder(saved):
    model, path = saved
    assert_same_weights(Toy.from_pretrained(path.parent, subfolder="toy"), model)


@pytest.mark.parametrize("safe", [True, False])
def test_push_to_hub(saved, tmp_path, monkeypatch, safe):
    """What reaches the hub's client is a model directory."""
    model, _ = saved

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            assert (repo_id, private, exist_ok) == ("me/toy", True, True)
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path):
            assert_same_weights(Toy.from_pretrained(folder_path), model)
            assert (Path(folder_path) / "model.safetensors").exists() == safe

    monkeypatch.setattr("storage.pretrained.HfApi", Api)
    address = model.push_to_hub("me/toy", private=True, safe_serialization=safe)
    assert address == "https://hub/me/toy"
