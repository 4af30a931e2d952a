from __future__ import annotations

import dataclasses
import inspect
import itertools
import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_fx.batches import Assigned, Call, assign_calls, bind_batch, bound_calls
from lowrank_fx.errors import CalibrationError, OptionError


def image_forward(x: Any) -> Any: ...
def text_forward(input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any: ...
def pair_forward(left: Any, right: Any, scale: float = 1.0) -> Any: ...
def variadic_forward(*parts: Any, **options: Any) -> Any: ...
def keyword_forward(x: Any, *, style: Any) -> Any: ...


def bind(batch: Any, forward: Callable[..., Any], forward_args: Callable[[Any], Any] | None = None) -> Call:
    return bind_batch(batch, inspect.signature(forward), forward_args, index=7)


def plain(batch: Any, index: int) -> Call:
    return bind_batch(batch, inspect.signature(image_forward), None, index)


IDS = torch.arange(12).reshape(3, 4)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the first nested tensor of a process says that they are a prototype
    NESTED = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)])
    JAGGED = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)


class TestBinding:
    def test_mapping_becomes_keywords_and_unknown_keys_are_dropped(self) -> None:
        call = bind({"input_ids": IDS, "attention_mask": MASK, "idx": torch.arange(3)}, text_forward)
        assert call.args == ()
        assert set(call.kwargs) == {"input_ids", "attention_mask"}
        assert call.mask is not None
        assert call.mask.dtype == torch.bool
        assert torch.equal(call.mask, MASK.bool())

    def test_user_dict_is_a_mapping(self) -> None:
        assert set(bind(UserDict({"input_ids": IDS}), text_forward).kwargs) == {"input_ids"}

    def test_object_with_keys_and_items_is_a_mapping(self) -> None:
        class Batch:
            def keys(self) -> list[str]:
                return ["input_ids"]

            def __getitem__(self, key: str) -> torch.Tensor:
                return IDS

        assert bind(Batch(), text_forward).kwargs["input_ids"] is IDS

    def test_variadic_keywords_keep_every_key(self) -> None:
        assert set(bind({"a": IDS, "b": 1}, variadic_forward).kwargs) == {"a", "b"}

    def test_mask_is_found_even_if_forward_does_not_take_it(self) -> None:
        call = bind({"x": IDS.float(), "attention_mask": MASK}, image_forward)
        assert set(call.kwargs) == {"x"}
        assert call.mask is not None

    @pytest.mark.parametrize("mask", [MASK[:, None, None, :], [1, 2], None])
    def test_what_is_not_a_matrix_is_no_padding_mask(self, mask: Any) -> None:
        assert bind({"input_ids": IDS, "attention_mask": mask}, text_forward).mask is None

    @pytest.mark.parametrize(
        "mask",
        [MASK, MASK.bool(), MASK.float(), MASK.double(), torch.where(MASK == 0, -1e9, 0.0), MASK.to(torch.int8)],
    )
    def test_masks_of_every_kind_mean_the_same(self, mask: torch.Tensor) -> None:
        found = bind({"input_ids": IDS, "attention_mask": mask}, text_forward).mask
        assert found is not None
        assert torch.equal(found, MASK.bool())

    def test_a_mask_that_adds_nothing_to_scores_hides_nothing(self) -> None:
        found = bind({"input_ids": IDS, "attention_mask": torch.zeros(3, 4)}, text_forward).mask
        assert found is not None
        assert bool(found.all())

    def test_mask_of_other_rows_is_left_out(self) -> None:
        batch = {"input_ids": IDS, "attention_mask": MASK}
        assert bind(batch, text_forward, lambda b: {"input_ids": b["input_ids"][:2]}).mask is None

    def test_tensor_is_the_one_argument(self) -> None:
        x = torch.zeros(2, 3)
        assert bind(x, image_forward).args == (x,)

    def test_image_label_pairs_are_cut_to_what_forward_requires(self) -> None:
        x, y = torch.zeros(2, 3), torch.zeros(2)
        pair = namedtuple("pair", ["image", "label"])
        for batch in ((x, y), [x, y], pair(x, y)):
            assert bind(batch, image_forward).args == (x,)
        assert bind((x, y, y), pair_forward).args == (x, y)

    def test_fields_that_name_what_forward_requires_become_keywords(self) -> None:
        @dataclasses.dataclass
        class Batch:
            right: torch.Tensor
            left: torch.Tensor
            label: int = 0

        pair = namedtuple("pair", ["right", "left", "scale"])
        x, y = torch.zeros(2, 3), torch.ones(2, 3)
        assert bind(Batch(x, y), pair_forward).kwargs == {"right": x, "left": y}
        call = bind(pair(x, y, 2.0), pair_forward)
        assert call.args == ()
        assert set(call.kwargs) == {"right", "left", "scale"}

    def test_a_dataclass_with_none_of_the_names_is_one_argument_torch_has_to_know(self) -> None:
        @dataclasses.dataclass
        class Hidden:
            image: torch.Tensor

        with pytest.raises(CalibrationError, match=r"batch 7 passes Hidden\(image: float32\[2, 3\]\).*register"):
            bind(Hidden(torch.zeros(2, 3)), image_forward)
        torch.export.register_dataclass(Hidden)
        call = bind(Hidden(torch.zeros(2, 3)), image_forward)
        assert call.batch_size == 2
        assert call.rows(0, 1).args[0].image.shape == (1, 3)

    def test_at_least_one_positional_argument_is_kept(self) -> None:
        assert bind((IDS, MASK), text_forward).args == (IDS,)

    def test_variadic_positional_takes_all(self) -> None:
        assert len(bind((IDS, IDS, IDS), variadic_forward).args) == 3

    @pytest.mark.parametrize(
        ("returned", "args", "keys"),
        [
            ((IDS, MASK), 2, set()),
            ({"input_ids": IDS}, 0, {"input_ids"}),
            (IDS, 1, set()),
            (((IDS,), {"attention_mask": MASK}), 1, {"attention_mask"}),
        ],
    )
    def test_forward_args_is_used_uncut(self, returned: Any, args: int, keys: set[str]) -> None:
        call = bind("anything", text_forward, lambda batch: returned)
        assert len(call.args) == args
        assert set(call.kwargs) == keys

    def test_mask_given_positionally_by_forward_args_is_found(self) -> None:
        call = bind("anything", text_forward, lambda batch: (IDS, MASK))
        assert call.mask is not None


class TestBindingErrors:
    @pytest.mark.parametrize(
        ("batch", "forward", "parts"),
        [
            (
                {"image": torch.zeros(2, 3)},
                image_forward,
                ["batch 7", "dict(image: float32[2, 3])", "forward(x)", "'x'"],
            ),
            ((torch.zeros(2),), pair_forward, ["tuple(float32[2])", "forward(left, right, scale=...)", "'right'"]),
            (torch.zeros(2), keyword_forward, ["'style'", "forward_args="]),
            (None, image_forward, ["batch 7 is None", "forward(x)"]),
            ("text", image_forward, ["batch 7 is a str"]),
            (np.zeros((2, 3), np.float32), image_forward, ["ndarray of float32[2, 3]", "convert with torch.as_tensor"]),
            ({"input_ids": [[1, 2]]}, text_forward, ["input_ids: list of 1", "torch.as_tensor"]),
            ({"ids": IDS}, text_forward, ["ids: int64[3, 4]", "no tensor"]),
            (torch.tensor(1.0), image_forward, ["float32[]", "first dimension"]),
            ([], image_forward, ["list()", "'x'"]),
            (NESTED, image_forward, ["holds a nested tensor", "attention_mask"]),
            (JAGGED, image_forward, ["holds a nested tensor", "attention_mask"]),
            ((UserDict({"x": IDS}),), image_forward, ["UserDict(x: int64[3, 4])", "turn the UserDict into a dict"]),
        ],
    )
    def test_message_says_what_came_and_what_was_expected(
        self, batch: Any, forward: Callable[..., Any], parts: list[str]
    ) -> None:
        with pytest.raises(CalibrationError) as caught:
            bind(batch, forward)
        for part in [*parts, "batch 7"]:
            assert part in str(caught.value)

    def test_forward_args_that_fails_is_named(self) -> None:
        with pytest.raises(CalibrationError, match=r"forward_args failed on batch 7.*KeyError") as caught:
            bind({"a": IDS}, image_forward, lambda batch: batch["pixels"])
        assert isinstance(caught.value.__cause__, KeyError)

    def test_forward_args_that_returns_something_else_is_named(self) -> None:
        with pytest.raises(CalibrationError, match="forward_args returned None for batch 7"):
            bind(IDS, image_forward, lambda batch: None)


class TestCall:
    def test_rows_cut_batched_tensors_and_the_mask_only(self) -> None:
        table = torch.zeros(5, 2)
        call = Call((IDS,), {"nested": [IDS, torch.tensor(2.0)], "table": table, "flag": True}, MASK.bool())
        part = call.rows(1, 3)
        assert torch.equal(part.args[0], IDS[1:])
        assert torch.equal(part.kwargs["nested"][0], IDS[1:])
        assert part.kwargs["nested"][1].item() == 2.0
        assert part.kwargs["table"] is table
        assert part.kwargs["flag"] is True
        assert part.mask is not None
        assert torch.equal(part.mask, MASK[1:].bool())

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
    @pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
    def test_rows_of_sparse_tensors(self, layout: torch.layout) -> None:
        part = Call((IDS.float().to_sparse(layout=layout),), {}).rows(1, 3)
        assert part.args[0].layout is layout
        assert torch.equal(part.args[0].to_dense(), IDS[1:].float())

    def test_batch_size_is_the_most_common_first_dimension(self) -> None:
        assert Call((torch.zeros(5, 2), torch.zeros(3), torch.zeros(3, 1)), {}).batch_size == 3
        assert Call((torch.zeros(5, 2), torch.zeros(3)), {}).batch_size == 5

    def test_batch_size_without_tensors_is_an_error(self) -> None:
        with pytest.raises(CalibrationError, match="no tensor"):
            _ = Call((1,), {}).batch_size

    def test_to_moves_tensors_and_mask(self) -> None:
        moved = Call((IDS,), {"x": IDS}, MASK.bool()).to("meta")
        assert all(tensor.device.type == "meta" for tensor in moved.tensors())
        assert len(moved.tensors()) == 2
        assert moved.mask is not None
        assert moved.mask.device.type == "meta"


def batches_of(sizes: list[int]) -> list[torch.Tensor]:
    """Batches whose rows are numbered through the whole loader."""
    rows = torch.arange(sum(sizes)).reshape(-1, 1)
    return list(torch.split(rows, sizes))


def split(loader: Any, holdout: float = 0.2) -> Iterator[Assigned]:
    return assign_calls(bound_calls(loader, plain), holdout)


def rows_by_role(assigned: list[Assigned]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {"calibrate": [], "select": [], "report": []}
    for piece in assigned:
        rows[piece.role] += piece.call.args[0].flatten().tolist()
    return rows


class TestRoles:
    def test_every_fifth_batch_is_held_out_and_halved(self) -> None:
        assigned = list(split(batches_of([4] * 10)))
        assert [(piece.index, piece.role) for piece in assigned if piece.role != "calibrate"] == [
            (4, "select"),
            (4, "report"),
            (9, "select"),
            (9, "report"),
        ]
        rows = rows_by_role(assigned)
        assert rows["select"] == [16, 17, 36, 37]
        assert rows["report"] == [18, 19, 38, 39]
        assert len(rows["calibrate"]) == 32

    def test_share_sets_the_period(self) -> None:
        assigned = split(batches_of([2] * 6), holdout=0.5)
        assert [piece.index for piece in assigned if piece.role == "select"] == [1, 3, 5]

    def test_held_out_batches_of_one_row_alternate(self) -> None:
        rows = rows_by_role(list(split(batches_of([1] * 20))))
        assert rows["select"] == [4, 14]
        assert rows["report"] == [9, 19]

    def test_few_batches_are_split_by_rows(self) -> None:
        rows = rows_by_role(list(split(batches_of([20, 10]))))
        assert rows["select"] == [16, 17, 28]
        assert rows["report"] == [18, 19, 29]

    def test_lone_held_out_row_falls_back_to_rows(self) -> None:
        # Batch 4 is held out but has one row, and no tenth batch comes.
        rows = rows_by_role(list(split(batches_of([10, 10, 10, 10, 1, 10]))))
        assert rows["select"] == [8, 18, 28, 38, 49]
        assert rows["report"] == [9, 19, 29, 39, 50]

    def test_three_single_rows_are_enough(self) -> None:
        rows = rows_by_role(list(split(batches_of([1, 1, 1]))))
        assert rows == {"calibrate": [0], "select": [1], "report": [2]}

    def test_generator_is_read_once_and_only_as_far_as_needed(self) -> None:
        read: list[int] = []

        def loader() -> Iterator[torch.Tensor]:
            for index, batch in enumerate(batches_of([2] * 50)):
                read.append(index)
                yield batch

        assigned = split(loader())
        next(assigned)
        assert read == [0, 1, 2, 3, 4]
        assert len(list(assigned)) == 59
        assert read == list(range(50))

    @given(
        sizes=st.lists(st.integers(1, 7), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) >= 3),
        holdout=st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5]),
    )
    def test_no_row_is_lost_and_none_has_two_roles(self, sizes: list[int], holdout: float) -> None:
        assigned = list(split(batches_of(sizes), holdout))
        rows = rows_by_role(assigned)
        assert sorted(itertools.chain.from_iterable(rows.values())) == list(range(sum(sizes)))
        assert all(rows.values())
        assert [piece.index for piece in assigned] == sorted(piece.index for piece in assigned)


class TestLoaderErrors:
    @pytest.mark.parametrize("holdout", [0.0, -0.1, 0.51, 1.0, float("nan")])
    def test_share_out_of_range(self, holdout: float) -> None:
        with pytest.raises(OptionError, match="holdout"):
            assign_calls([], holdout)

    @pytest.mark.parametrize("loader", [torch.zeros(8, 3), {"x": torch.zeros(8, 3)}])
    def test_one_batch_is_not_a_loader(self, loader: Any) -> None:
        with pytest.raises(CalibrationError, match=r"one batch.*pass \[batch\]"):
            bound_calls(loader, plain)

    @pytest.mark.parametrize("loader", [None, 3, image_forward])
    def test_not_iterable(self, loader: Any) -> None:
        with pytest.raises(CalibrationError, match="not iterable"):
            bound_calls(loader, plain)

    def test_empty(self) -> None:
        with pytest.raises(CalibrationError, match="no batch"):
            list(split(iter([])))

    def test_too_few_rows(self) -> None:
        with pytest.raises(CalibrationError, match=r"too few rows \(2, in batches of 1, 1\).*at least 3"):
            list(split(batches_of([1, 1])))

    def test_batch_without_rows(self) -> None:
        with pytest.raises(CalibrationError, match=r"batch 1 .*has no rows"):
            list(split([torch.zeros(4, 2), torch.zeros(0, 2)]))

    def test_loader_that_fails_half_way_is_named_with_the_batch(self) -> None:
        def loader() -> Iterator[torch.Tensor]:
            yield from batches_of([4] * 6)
            raise OSError("disk gone")

        with pytest.raises(CalibrationError, match="failed at batch 6: OSError: disk gone") as caught:
            list(split(loader()))
        assert isinstance(caught.value.__cause__, OSError)

    def test_batch_that_does_not_fit_is_named_by_its_index(self) -> None:
        with pytest.raises(CalibrationError, match="batch 2 is None"):
            list(split([torch.zeros(4, 2), torch.zeros(4, 2), None]))
