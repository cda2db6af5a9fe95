"""Rows as bytes: the spec, the codec's forms, and the last check."""

import base64

import numpy as np
import pytest
from msgspec.structs import replace

from common.errors import BadRows, RowsMismatch
from common.messages import RowBlock
from common.routed_experts.codec import (
    base64_length,
    base64_slices,
    block_of,
    encode_base64,
    row_fields,
    rows_from_reply,
    view,
)
from common.routed_experts.spec import RowSpec, smallest_dtype
from common.routed_experts.verify import verify
from common.versions import whole
from tests.support.rows import SPEC, cut, make_rows

WIDE = RowSpec(num_experts=300, top_k=3, layer_ids=(0, 1), num_hidden_layers=2)


@pytest.mark.parametrize(("num_experts", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16")])
def test_the_smallest_dtype_holds_the_largest_id(num_experts, dtype):
    assert smallest_dtype(num_experts) == dtype
    assert np.iinfo(dtype).max >= num_experts - 1


def test_a_header_says_what_its_bytes_are():
    header = SPEC.header(start=3, stop=10, weight_versions=whole(3, 10, "w1"))
    assert header.shape == (7, 3, 4)
    assert header.num_bytes == 7 * SPEC.row_bytes
    assert [(span.start, span.stop) for span in header.weight_versions] == [(3, 10)]
    assert SPEC.header(start=3, stop=3, weight_versions=whole(3, 3, "w1")).weight_versions == ()


@pytest.mark.parametrize("spec", [SPEC, WIDE])
def test_view_is_the_same_memory(spec):
    rows = make_rows(spec, 9)
    block = cut(spec, rows, 2, 9)
    np.testing.assert_array_equal(view(block), rows[2:9])
    assert np.shares_memory(view(block), rows)


def test_view_refuses_a_wrong_length():
    block = cut(SPEC, make_rows(SPEC, 4), 0, 4)
    with pytest.raises(RowsMismatch, match=r"\[0, 4\).* should be 48 bytes, but are 47"):
        view(RowBlock(block.header, bytes(block.data)[:-1]))
    with pytest.raises(RowsMismatch):
        view(RowBlock(replace(block.header, start=4, stop=0), b""))


@pytest.mark.parametrize("spec", [SPEC, WIDE])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 40_000])
def test_both_forms_come_back(spec, num_rows):
    rows = make_rows(spec, num_rows)
    block = cut(spec, rows, 0, num_rows)
    auto = rows_from_reply(row_fields(block, "auto", binary=False))
    np.testing.assert_array_equal(auto, rows)
    assert auto.dtype == spec.numpy_dtype
    full = rows_from_reply(row_fields(block, "int32", binary=False))
    assert full.shape == (num_rows, spec.num_hidden_layers, spec.top_k)
    assert full.dtype == np.dtype("<i4")
    np.testing.assert_array_equal(full[:, list(spec.layer_ids)], rows)
    dense = [layer for layer in range(spec.num_hidden_layers) if layer not in spec.layer_ids]
    assert not full[:, dense].any()
    np.testing.assert_array_equal(rows_from_reply(row_fields(block, "int32", binary=True)), rows)


@pytest.mark.parametrize("form", ["int32", "auto"])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 20_001])
def test_slices_are_one_padded_base64(form, num_rows):
    block = cut(SPEC, make_rows(SPEC, num_rows), 0, num_rows)
    slices = list(base64_slices(block, form))
    text = b"".join(slices)
    assert len(text) == base64_length(block.header, form)
    assert b"=" not in text[:-2]
    assert base64.b64encode(base64.b64decode(text, validate=True)) == text
    assert max(map(len, slices), default=0) <= 200_000
    assert (encode_base64(block, form) == "") == (num_rows == 0)


def test_fields_describe_each_form():
    block = cut(SPEC, make_rows(SPEC, 8), 5, 8)
    assert row_fields(block, "int32", binary=False) | {"routed_experts": None} == {
        "routed_experts": None,
        "routed_experts_start_len": 5,
        "routed_experts_shape": (3, 5, 4),
        "routed_experts_dtype": "int32",
        "routed_experts_layer_ids": (0, 1, 2, 3, 4),
        "routed_experts_moe_layer_ids": (1, 2, 4),
    }
    auto = row_fields(block, "auto", binary=False)
    assert (auto["routed_experts_shape"], auto["routed_experts_layer_ids"]) == ((3, 3, 4), (1, 2, 4))
    assert (auto["routed_experts_dtype"], auto["routed_experts_moe_layer_ids"]) == ("uint8", (1, 2, 4))


@pytest.mark.parametrize("spec", [SPEC, WIDE])
@pytest.mark.parametrize("num_rows", [0, 1, 50_000])
def test_good_rows_pass(spec, num_rows):
    verify(cut(spec, make_rows(spec, num_rows), 0, num_rows))


@pytest.mark.parametrize("spec", [SPEC, WIDE])
@pytest.mark.parametrize("position", [0, 20_000, 39_999])
def test_every_pair_of_equal_ids_is_found(spec, position):
    rows = make_rows(spec, 40_000)
    for left in range(spec.top_k):
        for right in range(left):
            bad = rows.copy()
            bad[position, -1, left] = bad[position, -1, right]
            with pytest.raises(BadRows, match=rf"^1 of .*twice.*position {position}, layer {spec.layer_ids[-1]}$"):
                verify(cut(spec, bad, 0, 40_000))


def test_an_id_out_of_range_is_found():
    rows = make_rows(SPEC, 10)
    rows[6, 1, 2] = rows[8, 0, 0] = 16
    with pytest.raises(BadRows, match=r"^2 of 21 .* outside \[0, 16\).*position 6, layer 2$"):
        verify(cut(SPEC, rows, 3, 10))


def test_all_zero_rows_are_bad():
    header = SPEC.header(start=0, stop=2, weight_versions=whole(0, 2, "w1"))
    with pytest.raises(BadRows, match=r"^6 of 6"):
        verify(block_of(header, np.zeros(header.shape, np.uint8)))


def test_verify_refuses_a_wrong_length():
    with pytest.raises(RowsMismatch):
        verify(RowBlock(SPEC.header(start=0, stop=2, weight_versions=whole(0, 2, "w1")), b"\0"))
