import io

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.runs.journal.columns import FILTERS, narrow, pack_text, runs, unpack_text, unrun, write_array


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_narrow_keeps_every_value(values: list[int]) -> None:
    assert narrow(np.array(values, np.int64)).tolist() == values


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([], "u1"), ([255], "u1"), ([256], "u2"), ([65536], "u4"), ([2**32], "u8"), ([-1, 127], "i1"), ([-1, 128], "i2")],
)
def test_narrow_takes_the_smallest_type(values: list[int], dtype: str) -> None:
    assert narrow(np.array(values, np.int64)).dtype == dtype


@given(st.lists(st.sampled_from([-1, 0, 1, 70_000])))
def test_runs_give_the_values_back(values: list[int]) -> None:
    assert unrun(runs(np.array(values, np.int64))).tolist() == values


@given(st.lists(st.text(st.characters(codec=None, categories=None))))
def test_text_comes_back_with_lone_surrogates(texts: list[str]) -> None:
    assert unpack_text(*pack_text(texts)) == texts


@pytest.mark.parametrize("shape", [(0,), (3,), (700_000,), (0, 4, 2), (300_000, 4, 2)])
def test_arrays_of_any_size_can_be_stored(shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    with h5py.File(io.BytesIO(), "w") as file:
        write_array(file, "values", values)
        assert np.array_equal(file["values"][:], values)
        assert file["values"].dtype == values.dtype


@pytest.mark.parametrize("filters", [FILTERS, {"compression": "gzip", "compression_opts": 1}, {"compression": "lzf"}])
def test_tables_of_many_chunks_can_be_stored(filters: dict) -> None:
    values = np.zeros(200_001, dtype=[("value", "u1"), ("count", "f8")])
    values["value"], values["count"] = np.arange(len(values)) % 251, np.arange(len(values))
    with h5py.File(io.BytesIO(), "w") as file:
        write_array(file, "values", values, filters)
        assert file["values"].chunks[0] < len(values)
        assert np.array_equal(file["values"][:], values)
