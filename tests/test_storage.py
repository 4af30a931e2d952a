"""What is saved comes back bit by bit; what is damaged, foreign or half-written is refused with the reason."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lowrank_fx
from lowrank_fx import Keep, storage, weight_files
from lowrank_fx._files import sha256_file
from lowrank_fx.errors import StorageError
from lowrank_fx.latency import PairedTiming
from lowrank_fx.manifest import FORMAT
from lowrank_fx.module import LowRankModule


class Net(nn.Module):
    """Convolution and batch norm, a tied weight, a buffer that is not saved, a keyword argument."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.one = nn.Linear(12, 12)
        self.two = nn.Linear(12, 12, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(12, 10)
        self.register_buffer("offset", torch.linspace(-1, 1, 12), persistent=False)

    def forward(self, image: Tensor, gain: float = 1.0) -> dict[str, Tensor]:
        hidden = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        hidden = self.two(torch.tanh(self.one(hidden))) + self.offset.to(image.dtype)
        return {"logits": self.head(hidden) * gain}


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 5, 5, generator=generator).to(dtype) for _ in range(5)]


def optimize(model: nn.Module, loader: list[Any], share: float = 0.6) -> LowRankModule:
    return lowrank_fx.optimize(model, loader, target=Keep(params=share, of="sites"), compile=False, progress=False)


def load(model: nn.Module, folder: Path, **options: Any) -> LowRankModule:
    return lowrank_fx.load(model, folder, compile=False, **options)


def same(one: nn.Module, other: nn.Module, *inputs: Any) -> bool:
    with torch.no_grad():
        pairs = zip(pytree.tree_leaves(one(*inputs)), pytree.tree_leaves(other(*inputs)), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module", autouse=True)
def _no_stopwatch() -> Iterator[None]:
    """Measuring a model takes ten seconds; here only that its timing is kept matters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank_fx.module, "measure", lambda *_: PairedTiming(1.25, 0.5, 0.4, 0.01, 7))
        yield


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def fast(model: Net) -> LowRankModule:
    made = optimize(model, batches())
    assert {site.name for site in made.plan.factored} >= {"conv", "two"}
    return made


@pytest.fixture
def saved(fast: LowRankModule, tmp_path: Path) -> Path:
    folder = tmp_path / "deep" / "out"
    fast.save(folder)
    return folder


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def edit_plan(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "plan.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def replace_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Other tensors in the weights file, with a plan that vouches for them."""
    save_file(tensors, weights_of(folder))
    vouch(folder, list(tensors))


def vouch(folder: Path, names: list[str] | None = None) -> None:
    """Let the plan say of the weights file what it is now."""
    path = weights_of(folder)
    entry: dict[str, Any] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    if names is not None:
        entry["tensors"] = names
    edit_plan(folder, lambda data: data["weights"]["files"][0].update(entry))


# ---- round trips -----------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_by_bit(model: Net, fast: LowRankModule, saved: Path) -> None:
    again = load(model, saved)
    assert same(again, fast, batches()[0])
    assert same(again, fast, batches()[0][:3])
    assert list(again.state_dict()) == list(fast.state_dict())
    assert all(torch.equal(tensor, fast.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert again.plan == fast.plan
    assert again.timing == fast.timing
    assert again.artifact.base == fast.artifact.base
    assert sorted(path.name for path in saved.iterdir()) == sorted(["plan.json", weights_of(saved).name])


def test_a_folded_model_comes_back_folded(model: Net, fast: LowRankModule, tmp_path: Path) -> None:
    folded = fast.fold()
    folded.save(tmp_path)
    again = load(model, tmp_path)
    assert again.artifact.folded
    assert same(again, folded, batches()[1])
    assert not any("factor" in name for name in again.state_dict())


def test_a_loaded_model_saves_the_same_bytes_again(model: Net, saved: Path, tmp_path: Path) -> None:
    load(model, saved).save(tmp_path / "again")
    assert (tmp_path / "again" / "plan.json").read_bytes() == (saved / "plan.json").read_bytes()
    assert weights_of(tmp_path / "again").read_bytes() == weights_of(saved).read_bytes()


def test_the_file_holds_each_tensor_once_and_the_user_s_model_stays(model: Net, saved: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load(model, saved)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    names = [name for name in load_file(weights_of(saved)) if not name.startswith(storage.CAPTURED)]
    assert set(names) >= {"conv.factor_in", "conv.factor_out", "two.factor_in"}
    assert len({tensor.data_ptr() for tensor in loaded.state_dict().values()}) == len(names)


def test_bfloat16_comes_back_bit_by_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().eval().bfloat16()
    fast = optimize(model, batches(torch.bfloat16))
    fast.save(tmp_path)
    again = load(model, tmp_path)
    assert {tensor.dtype for tensor in again.parameters()} == {torch.bfloat16}
    assert same(again, fast, batches(torch.bfloat16)[0])


def test_a_model_that_was_cast_after_it_was_made_comes_back_cast(
    model: Net, fast: LowRankModule, tmp_path: Path
) -> None:
    wide = copy.deepcopy(fast).double()
    wide.save(tmp_path)
    again = load(model, tmp_path)
    assert {tensor.dtype for tensor in again.parameters()} == {torch.float64}
    assert same(again, wide, batches()[0].double())
    assert {tensor.dtype for tensor in fast.parameters()} == {tensor.dtype for tensor in model.parameters()}


def test_weights_tied_outside_of_any_site_are_stored_once(tmp_path: Path) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30, 12)
            self.inner = nn.Linear(12, 12)
            self.out = nn.Linear(12, 30, bias=False)
            self.out.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.sub(self.out(torch.tanh(self.inner(self.table(tokens)))), 0)

    torch.manual_seed(0)
    model = Lookup().eval()
    tokens = [torch.randint(0, 30, (6, 4), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    fast = optimize(model, tokens)
    fast.save(tmp_path)
    again = load(model, tmp_path)
    assert same(again, fast, tokens[0])
    assert sum(tensor.shape == (30, 12) for tensor in load_file(weights_of(tmp_path)).values()) == 1
    assert sum(parameter.shape == (30, 12) for parameter in again.parameters()) == 1


def test_no_factored_layer_at_all_is_a_model_too(model: Net, fast: LowRankModule, tmp_path: Path) -> None:
    dense = fast.replan(Keep(params=1.0, of="sites"))
    dense.save(tmp_path)
    assert same(load(model, tmp_path), dense, batches()[0])


# ---- the weights and the model ---------------------------------------------------------------------------------------


def test_other_weights_are_refused_by_name(saved: Path) -> None:
    torch.manual_seed(0)
    other = Net().eval()
    with torch.no_grad():
        other.norm.running_var[3] += 0.5  # type: ignore[index]
    with pytest.raises(StorageError, match=r"'norm\.running_var' has other values than the weights the plan was made"):
        load(other, saved)


def test_another_shape_dtype_or_set_of_tensors_is_refused_by_name(model: Net, saved: Path) -> None:
    torch.manual_seed(0)
    wider = Net().eval()
    wider.head = nn.Linear(12, 11)
    with pytest.raises(StorageError, match=r"'head\.weight' is \(11, 12\) torch\.float32, the plan.*\(10, 12\)"):
        load(wider, saved)
    with pytest.raises(StorageError, match=r"'conv\.weight' is .* torch\.float64, the plan was made for .*float32"):
        load(Net().double(), saved)
    more = Net().eval()
    more.load_state_dict(model.state_dict())
    more.extra = nn.Linear(2, 2)
    with pytest.raises(StorageError, match=r"'extra\.weight': the plan was made without it"):
        load(more, saved)
    with pytest.raises(StorageError, match=r"'conv\.weight': this model has no such tensor"):
        load(nn.Sequential(), saved)


def test_a_plan_for_another_layer_or_size_is_refused(model: Net, saved: Path) -> None:
    text = (saved / "plan.json").read_text()

    def rename(data: dict[str, Any]) -> None:
        data["plan"]["sites"][0]["name"] = "nowhere"
        data["captured"]["gaps"]["nowhere"] = data["captured"]["gaps"].pop("conv")

    edit_plan(saved, rename)
    with pytest.raises(StorageError, match="the plan factors 'nowhere', which is no layer of this model"):
        load(model, saved)
    (saved / "plan.json").write_text(text)
    edit_plan(saved, lambda data: data["plan"]["sites"][0].update(out_features=13))
    with pytest.raises(StorageError, match="'conv' is 12 x 27, the plan says 13 x 27"):
        load(model, saved)


def test_tensors_in_the_file_must_be_those_of_the_model(model: Net, saved: Path) -> None:
    tensors = load_file(weights_of(saved))
    replace_weights(saved, {name: tensor for name, tensor in tensors.items() if name != "head.bias"})
    with pytest.raises(StorageError, match=r"tensor 'head\.bias' is missing in the file"):
        load(model, saved)
    replace_weights(saved, {**tensors, "spare": torch.zeros(1)})
    with pytest.raises(StorageError, match="tensor 'spare' is not in the model"):
        load(model, saved)
    replace_weights(saved, {**tensors, "head.bias": torch.zeros(11)})
    with pytest.raises(StorageError, match=r"'head\.bias' is \(11,\) torch\.float32, the model needs \(10,\)"):
        load(model, saved)
    replace_weights(saved, {**tensors, "head.bias": torch.zeros(10, dtype=torch.int32)})
    with pytest.raises(StorageError, match=r"'head\.bias' is \(10,\) torch\.int32"):
        load(model, saved)


def test_damaged_weights_are_refused(model: Net, saved: Path) -> None:
    path = weights_of(saved)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(StorageError, match=rf"damaged: it has {len(whole) - 8} bytes, plan\.json says {len(whole)}"):
        load(model, saved)
    vouch(saved)
    with pytest.raises(StorageError, match="not a safetensors file"):
        load(model, saved)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    edit_plan(saved, lambda data: data["weights"]["files"][0].update(bytes=len(whole)))
    with pytest.raises(StorageError, match=r"damaged: its checksum is not the one in plan\.json"):
        load(model, saved)
    path.unlink()
    with pytest.raises(StorageError, match=r"the file that plan\.json names is missing"):
        load(model, saved)


# ---- plan.json -------------------------------------------------------------------------------------------------------


def test_a_missing_or_unreadable_plan_is_refused(model: Net, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"plan\.json could not be read: No such file"):
        load(model, tmp_path / "nowhere")
    (saved / "plan.json").write_text('{"format": 1, "plan"')
    with pytest.raises(StorageError, match=r"plan\.json is not valid JSON"):
        load(model, saved)
    (saved / "plan.json").write_text("[]")
    with pytest.raises(StorageError, match=f"a format from 1 to {FORMAT} is expected, the file says 'list'"):
        load(model, saved)


def test_another_format_version_is_refused(model: Net, saved: Path) -> None:
    edit_plan(saved, lambda data: data.update(format=FORMAT + 1))
    with pytest.raises(StorageError, match=rf"of format {FORMAT + 1}, which is newer than format {FORMAT}, .* upgrade"):
        load(model, saved)
    for older in (0, -1, True, 2.0, "2", None):
        edit_plan(saved, lambda data, older=older: data.update(format=older))  # type: ignore[misc]
        with pytest.raises(StorageError, match=f"a format from 1 to {FORMAT} is expected, the file says {older!r}"):
            load(model, saved)


def _replace(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update({key: value})


@pytest.mark.parametrize(
    "change",
    [
        *(_replace(key, None) for key in ("plan", "base", "weights")),
        _replace("timing", {"speed": 2}),
        _replace("base", {"conv.weight": {"shape": 3}}),
        _replace("weights", {"files": [{"file": 3, "sha256": "", "bytes": 1, "tensors": []}]}),
        _replace("weights", {"files": []}),
        _replace("call", {"tensor": ["load", [2]]}),
        _replace("call", {"tensor": ["float32", [-2]]}),
        _replace("call", {"tensor": ["float32", [2**62, 2**62]]}),
        _replace("call", {"pickle": "x", "value": 1}),
        _replace("call", 3),
        *(lambda data, key=key: data.pop(key) for key in ("plan", "base", "weights", "call", "timing", "folded")),
    ],
)
def test_a_plan_file_with_wrong_content_is_refused(
    model: Net, saved: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    edit_plan(saved, change)
    with pytest.raises(StorageError, match=r"plan\.json"):
        load(model, saved)


@pytest.mark.parametrize("name", ["../{}", "sub/{}", "{}/../{}", "/{}", "model.bin", "..", ""])
def test_a_weights_file_outside_of_the_folder_is_refused(model: Net, saved: Path, name: str) -> None:
    path = weights_of(saved)
    (saved / "sub").mkdir()
    for place in (saved.parent, saved / "sub"):
        (place / path.name).write_bytes(path.read_bytes())
    edit_plan(saved, lambda data: data["weights"]["files"][0].update(file=name.replace("{}", path.name)))
    with pytest.raises(StorageError, match=r"plan\.json: damaged: .*is not a plain file name"):
        load(model, saved)


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was opened",)


def test_pickles_are_never_opened(model: Net, fast: LowRankModule, saved: Path) -> None:
    bomb = pickle.dumps(Bomb())
    for name in ("pytorch_model.bin", "model.pt", "plan.pkl"):
        (saved / name).write_bytes(bomb)
    assert same(load(model, saved), fast, batches()[0])
    weights_of(saved).write_bytes(bomb)
    vouch(saved)
    with pytest.raises(StorageError, match="not a safetensors file"):
        load(model, saved)


# ---- saving over an older model --------------------------------------------------------------------------------------


def test_an_older_model_is_replaced_and_foreign_files_stay(model: Net, fast: LowRankModule, saved: Path) -> None:
    old = weights_of(saved)
    smaller = fast.replan(Keep(params=0.4, of="sites"))
    foreign = ["model-00001-of-00002.safetensors", "model-final.safetensors", "notes.txt"]
    for name in foreign:
        (saved / name).write_bytes(b"mine")
    smaller.save(saved)
    assert not old.exists()
    assert all((saved / name).read_bytes() == b"mine" for name in foreign)
    assert len(list(saved.iterdir())) == 2 + len(foreign)
    assert same(load(model, saved), smaller, batches()[0])


def test_saving_twice_keeps_the_one_file(model: Net, fast: LowRankModule, saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    fast.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


class Killed(BaseException):
    """Stands for a process that ends."""


def test_a_save_that_is_killed_before_the_plan_leaves_the_old_model(
    model: Net, fast: LowRankModule, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = fast.replan(Keep(params=0.4, of="sites"))

    def killed(*_: object) -> None:
        # By now the new weights lie beside the old ones.
        assert len(list(saved.glob("*.safetensors"))) == 2
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", killed)
        with pytest.raises(Killed):
            smaller.save(saved)
    assert same(load(model, saved), fast, batches()[0])
    # The next save cleans up after it.
    smaller.save(saved)
    assert len(list(saved.iterdir())) == 2
    assert same(load(model, saved), smaller, batches()[0])


def test_a_save_that_is_killed_before_the_old_weights_are_removed_is_the_new_model(
    model: Net, fast: LowRankModule, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = fast.replan(Keep(params=0.4, of="sites"))
    old = weights_of(saved)
    removed: list[Path] = []

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            removed.append(path)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            smaller.save(saved)
    assert removed == [old]
    assert same(load(model, saved), smaller, batches()[0])


def test_a_folder_that_cannot_be_written_is_refused(
    fast: LowRankModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"the model could not be saved: .*File exists"):
        fast.save(tmp_path / "file")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(weight_files, "save_file", full)
    with pytest.raises(StorageError, match=r"the model could not be saved: .*No space left"):
        fast.save(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# ---- example calls ---------------------------------------------------------------------------------------------------


class Sizes:
    """A structure that JSON does not know."""

    def __init__(self, factor: int) -> None:
        self.factor = factor


pytree.register_pytree_node(
    Sizes,
    lambda sizes: ([sizes.factor], None),
    lambda items, _: Sizes(*items),
    serialized_type_name="test.Sizes",
    flatten_with_keys_fn=lambda sizes: ([(pytree.GetAttrKey("factor"), sizes.factor)], None),
)


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        factor = sizes.factor if isinstance(sizes, Sizes) else sizes["pair"][1]
        return torch.mul(self.layer(x), factor)


@pytest.mark.parametrize("sizes", [{"pair": (None, 3), "names": ["a", True, 0.5]}, Sizes(3)])
def test_inputs_that_json_does_not_know_are_asked_for(tmp_path: Path, sizes: Any) -> None:
    torch.manual_seed(0)
    model = Structured().eval()
    loader = [{"x": torch.randn(8, 12), "sizes": sizes} for _ in range(5)]
    fast = optimize(model, loader)
    fast.save(tmp_path)
    if isinstance(sizes, Sizes):
        with pytest.raises(StorageError, match=r"could not be stored; pass load\(model, folder, example=batch\)"):
            load(model, tmp_path)
        again = load(model, tmp_path, example=loader[0])
    else:
        again = load(model, tmp_path)
    x = loader[0]["x"]
    with torch.no_grad():
        assert torch.equal(again(x=x, sizes=sizes), fast(x=x, sizes=sizes))
        assert torch.equal(again(x[:2], sizes), fast(x[:2], sizes))
